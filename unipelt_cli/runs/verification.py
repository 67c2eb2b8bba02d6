"""Whether a run is what it says it is, and whether it can be had again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unipelt_cli.backbones.pretrained import find
from unipelt_cli.data.manifest import digest_rows
from unipelt_cli.errors import UnipeltError
from unipelt_cli.files import sealed
from unipelt_cli.files.as_json import keyed
from unipelt_cli.runs import schema
from unipelt_cli.runs.checks import check_file, check_seal, recorded_files
from unipelt_cli.runs.names import MODEL, RESULT
from unipelt_cli.runs.probe import PROBE_ROWS
from unipelt_cli.runs.run import Run, read_run
from unipelt_cli.system.check import Check

MACHINE = ("unipelt", "python", "platform", "processor", "threads", "device")
OUTCOME = ("best_epoch", "epochs", "collapsed")
CONDITIONS = ("precision", "together", "processes", "micro_batch_size")


def verify(
    directory: Path, source: str | None = None, backbone: str | None = None
) -> Iterator[Check]:
    """Check a finished run: every file's hash, the backbone, the tensors, the logits, the rows.

    `source` and `backbone` say where rows and backbone are now. Rows that are not there are not
    checked; all else that is wrong fails. Raises RunError for a directory that holds no finished
    run at all. What damaged files would be needed for is left out.
    """
    if not (directory / RESULT).is_file():
        read_run(directory)
    files = list(_files(directory))
    yield from files
    if not all(check.ok for check in files):
        return
    try:
        run = read_run(directory)
    except UnipeltError as error:
        yield Check("contents", False, error.message)
        return
    checked = _try("backbone", lambda: _backbone(run, backbone))
    yield checked
    if checked.ok:
        logits = _try("tensors and logits", lambda: _logits(run, backbone))
        yield logits
        if logits.ok:
            yield from _finer_logits(run, backbone)
    for task_index in range(len(run.tasks)):
        yield from _rows(run, source, task_index)


def _files(directory: Path) -> Iterator[Check]:
    """Compare the files with the hashes in the result, and the result with its own."""
    path = directory / RESULT
    result: dict[str, Any] = {}

    def check_result() -> str:
        result.update(schema.shaped(path, sealed.read_object(path), schema.Result))
        check_seal(path, result)
        return f"sha256 {result[sealed.SEAL][:12]}"

    first = _try(RESULT, check_result)
    yield first
    if first.ok:
        for name in recorded_files(result):
            yield _try(name, lambda name=name: _file(directory / name, result["files"][name]))  # type: ignore[misc]


def _file(path: Path, sha256: str) -> str:
    check_file(path, sha256)
    return f"sha256 {sha256[:12]}"


def _backbone(run: Run, backbone: str | None) -> str:
    pretrained = find(backbone or run.experiment.model.backbone)
    run.check_backbone(pretrained)
    return f"{pretrained.name} ({pretrained.fingerprint[:12]})"


def _logits(run: Run, backbone: str | None, precision: str | None = None) -> str:
    _, comparison = run.build_compared(backbone=backbone, precision=precision)
    then, now = run.environment["threads"], torch.get_num_threads()
    threads = "" if now == then else f", with {now} threads instead of {then}"
    return (
        f"{PROBE_ROWS} rows differ by {comparison.difference:.1e} at most, "
        f"{comparison.allowed:.0e} allowed{threads}"
    )


def _finer_logits(run: Run, backbone: str | None) -> Iterator[Check]:
    """Check the logits that a run in bf16 stored in fp32: they tell more."""
    _, *others = run.stored_probe.by_precision
    for precision in others:
        yield _try(f"logits in {precision}", partial(_logits, run, backbone, precision))


def _rows(run: Run, source: str | None, task_index: int) -> Iterator[Check]:
    name = f"{run.tasks[task_index].name} rows"
    try:
        prepared = run.prepared(source, task_index)
    except UnipeltError as error:
        yield Check(name, None, f"not found: {error.message}")
        return
    for split, rows in prepared.splits.items():
        if split not in run.splits:
            yield Check(f"{name}, {split}", False, "the run had none")
            continue
        expected = run.digest_of(split, task_index)
        passed = digest_rows(rows) == expected
        outcome = f"{len(rows)}, sha256 {expected[:12]}" if passed else "not those of the run"
        yield Check(f"{name}, {split}", passed, outcome)


def _try(what: str, look: Callable[[], str]) -> Check:
    try:
        return Check(what, True, look())
    except UnipeltError as error:
        return Check(what, False, error.message)


@contextmanager
def as_trained(run: Run) -> Iterator[None]:
    """Inside, compute with as many threads as the run did: sums then go the same way."""
    before = torch.get_num_threads()
    torch.set_num_threads(run.environment["threads"])
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Difference:
    """What one run says otherwise than the other, and what each says."""

    what: str
    original: object = field(metadata=keyed("there"))
    here: object


def differences(original: Run, here: Run) -> list[Difference]:
    """Return what differs between two runs: conditions first, then the outcome."""
    described = _described(original), _described(here)
    return [
        Difference(what, value, described[1].get(what))
        for what, value in described[0].items()
        if value != described[1].get(what)
    ]


def is_equal(original: Run, here: Run) -> bool:
    """Say whether two runs have the same scores and, to the byte, the same tensors."""
    return all(_outcome(original)[what] == value for what, value in _outcome(here).items())


def _described(run: Run) -> dict[str, object]:
    environment, result = run.environment, run.result
    described = {
        **{key: environment.get(key) for key in MACHINE},
        **environment.get("packages", {}),
        "backbone": environment["backbone"]["fingerprint"][:12],
        **{key: result.get(key) for key in CONDITIONS},
    }
    for task_index, task in enumerate(run.tasks):
        for split in run.splits:
            described[f"{task.name} {split} rows"] = run.digest_of(split, task_index)[:12]
    return described | _outcome(run)


def _outcome(run: Run) -> dict[str, object]:
    result = run.result
    scores = {f"{s} {name}": value for s in ("dev", "test") for name, value in result[s].items()}
    # Of the tensors alone: the file's header names the place where the backbone lies.
    tensors = sealed.digest(sealed.open_tensors(run.directory / MODEL)[0], {})[:12]
    return scores | {key: result[key] for key in OUTCOME} | {"tensors": tensors}
