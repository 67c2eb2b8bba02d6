"""The prepared directory: splits as Arrow files beside their manifest, stored and read."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from unipelt_cli.data import parquet
from unipelt_cli.data.cells import LARGEST_VALUE, as_dataset
from unipelt_cli.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    check_manifest,
    digest_rows,
    dumps,
    seal_manifest,
)
from unipelt_cli.data.text_files.decoded_lines import read_bytes
from unipelt_cli.errors import DataError
from unipelt_cli.files import atomic
from unipelt_cli.files.strict import parse_json
from unipelt_cli.tasks import TASKS, Task
from unipelt_cli.text import reason

GIVE_PREPARED = "give a directory that `unipelt prepare` wrote"


@dataclass(frozen=True)
class Prepared:
    """A resolved task, its rows as "train", "dev" and "test", and what is recorded of them.

    "dev" is not there without dev rows, nor "test" where folds of the train rows are tested.

    Columns: the task's text columns (str), "label" (int64 index; float64 value in regression) and
    "row" (int64, the row's place in its source, from 0).
    """

    task: Task
    splits: Mapping[str, Dataset]
    manifest: Mapping[str, Any]


def save_prepared(prepared: Prepared, directory: Path) -> None:
    """Write a prepared directory, whole or not at all; parents are made.

    Raises RunError when it exists already or cannot be written.
    """
    with atomic.new_directory(directory) as temporary:
        for split, rows in prepared.splits.items():
            table = rows.with_format("arrow")[:].replace_schema_metadata(None).combine_chunks()
            path = str(temporary / f"{split}.arrow")
            with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        (temporary / MANIFEST).write_bytes(dumps(prepared.manifest))


def load_prepared(directory: Path) -> Prepared:
    """Read what `save_prepared` wrote, and check it by its hashes.

    Raises DataError when it is absent, foreign, of a newer format, or damaged.
    """
    manifest = read_manifest(directory)
    task, recorded = task_of(manifest), manifest["splits"]
    splits = {
        split: _read_split(directory, split, task, recorded[split])
        for split in SPLITS
        if split in recorded
    }
    return Prepared(task, splits, manifest)


def task_of(manifest: Mapping[str, Any]) -> Task:
    """Return the task that a manifest describes."""
    name, labels, text = manifest["task"], tuple(manifest["labels"]), tuple(manifest["text"])
    task = Task(
        name,
        text,
        labels,
        manifest["metric"],
        tuple(manifest["also"]),
        positive=manifest.get("positive"),
        decimal_comma=manifest.get("decimal_comma", False),
    )
    known = TASKS.get(name)
    if known and (known.text, known.labels) == (text, labels):
        is_its_own = task.positive_label == known.positive_label
        positive = known.positive if is_its_own else task.positive
        task = replace(known, metric=task.metric, also=task.also, positive=positive)
    return task


def _read_split(directory: Path, split: str, task: Task, recorded: Mapping[str, Any]) -> Dataset:
    name = f"{split}.arrow"
    label = pa.float64() if task.is_regression else pa.int64()
    columns = [*((text, pa.string()) for text in task.text), ("label", label), ("row", pa.int64())]
    content = _read_file(directory, name)
    try:
        table = read_stream(content, pa.schema(columns))
        _check_cells(table, task)
        rows = as_dataset(table)
        read = (digest_rows(rows), rows[:]["row"])
    except parquet.ERRORS as error:
        _damaged(directory, f"{name}: {reason(error)}", error)
    if read != (recorded["digest"], recorded["row_ids"]):
        _damaged(directory, f"{name} does not hold the rows of {MANIFEST}")
    return rows


def _check_cells(table: pa.Table, task: Task) -> None:
    """Raise ValueError for cells that no checked row has: missing ones, labels out of range."""
    if any(column.null_count for column in table.columns):
        raise ValueError("cells are missing")
    label = table["label"]
    if task.is_regression:
        # Not the other way round: NaN is neither larger nor smaller.
        if not pc.all(pc.less_equal(pc.abs(label), LARGEST_VALUE)).as_py():
            raise ValueError("a label is not finite")
    elif not pc.all(pc.and_(pc.greater_equal(label, 0), pc.less(label, task.outputs))).as_py():
        raise ValueError(f"a label is none of {task.outputs}")


def read_manifest(directory: Path) -> Mapping[str, Any]:
    """Read a prepared directory's manifest; raise DataError for one that is absent or changed."""
    if not has_manifest(directory):
        raise DataError(f"{directory}: not a prepared directory (no {MANIFEST})", GIVE_PREPARED)
    content = _read_file(directory, MANIFEST)
    try:
        manifest = parse_json(content)
        intact = isinstance(manifest, dict) and manifest == seal_manifest(manifest)
    except ValueError as error:
        _damaged(directory, f"{MANIFEST}: {reason(error)}", error)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise DataError(f"{directory}: its {MANIFEST} is not one of unipelt's", GIVE_PREPARED)
    if manifest["format"] != FORMAT:
        raise DataError(
            f"{directory}: format {manifest['format']}, but this version reads format {FORMAT}",
            "update unipelt, or prepare the data again",
        )
    if not intact:
        _damaged(directory, f"{MANIFEST} was changed")
    try:
        check_manifest(manifest)
    except ValueError as error:
        _damaged(directory, f"{MANIFEST}: {reason(error)}", error)
    return manifest


def _read_file(directory: Path, name: str) -> bytes:
    """Read a file of a prepared directory; a link is never followed out of it."""
    path = directory / name
    try:
        is_inside = path.resolve().is_relative_to(directory.resolve())
    except (OSError, RuntimeError) as error:
        _damaged(directory, f"{name}: {reason(error)}", error)
    if not is_inside:
        raise DataError(f"{path}: a link out of the directory", "put the file itself there")
    return read_bytes(path, (path.suffix,))


def has_manifest(directory: Path) -> bool:
    """Say whether a directory is a prepared one."""
    try:
        return (directory / MANIFEST).is_file()
    except OSError as error:
        hint = "check the path and its rights"
        raise DataError(f"{directory}: {reason(error)}", hint) from error


def _damaged(directory: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise DataError(f"{directory}: damaged ({what})", "prepare the data again") from cause


def read_stream(content: bytes, schema: pa.Schema) -> pa.Table:
    """Read an Arrow stream that has exactly this schema and unpacks nothing.

    Raises one of `parquet.ERRORS` for another or a damaged one, for compressed buffers, which can
    unpack to anything, and for arrays that share bytes, which together can be larger than the
    stream.
    """
    messages = pa.ipc.MessageReader.open_stream(pa.BufferReader(content))
    while message := _next(messages):
        if message.type not in ("schema", "record batch"):
            raise ValueError(f"it holds a message of type {message.type}")
        if message.type == "record batch" and _is_compressed(message.metadata):
            raise ValueError("it holds compressed buffers")
    stream = pa.ipc.open_stream(pa.BufferReader(content))
    if not stream.schema.remove_metadata().equals(schema):
        raise ValueError(f"columns {', '.join(stream.schema.names)[:60]} of other types or names")
    table = stream.read_all()
    table.validate(full=True)
    if table.nbytes > len(content):
        raise ValueError("its columns share bytes")
    return table.replace_schema_metadata(None)


def _next(messages: Any) -> Any:
    try:
        return messages.read_next_message()
    except StopIteration:
        return None


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Say whether a record batch's flatbuffer has its field 3, which names a compression."""
    content = metadata.to_pybytes()
    message = struct.unpack_from("<I", content)[0]
    batch = _field(content, message, 2)
    if batch is None:
        return False
    table = batch + struct.unpack_from("<I", content, batch)[0]
    return _field(content, table, 3) is not None


def _field(content: bytes, table: int, number: int) -> int | None:
    """Return where a flatbuffer table's field is; None where it has none."""
    layout = table - struct.unpack_from("<i", content, table)[0]
    size = struct.unpack_from("<H", content, layout)[0]
    if 4 + 2 * number >= size:
        return None
    offset = struct.unpack_from("<H", content, layout + 4 + 2 * number)[0]
    return table + offset if offset else None
