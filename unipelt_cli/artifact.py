"""Files that are whole or not there: atomic writing, and tensors that are read back strictly."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unipelt_cli.errors import RunError

FORMAT = 1
HEADER_KEY = "unipelt"  # one key: the library writes several in no fixed order
REMEDY = "train the run again with --overwrite"


def write(path: Path, content: bytes) -> None:
    """Write a file atomically: whole, on the disk, then renamed into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON, atomically."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write below `path` into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error})",
            "free space or give an --out that can be written",
        ) from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None
) -> None:
    """Write tensors as safetensors, atomically; a header is kept as one JSON string."""
    metadata = None if header is None else {HEADER_KEY: json.dumps(header, sort_keys=True)}
    write(path, save({name: t.cpu().contiguous() for name, t in tensors.items()}, metadata))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, shapes and bytes in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise RunError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RunError(f"{path}: missing or damaged", REMEDY)
    return value


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all tensors and the header of a file that `write_tensors` wrote.

    Raises RunError when it is missing, damaged, or foreign.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, dict(header)  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise RunError(f"{path}: missing, damaged, or not written by unipelt", REMEDY) from None


def read_header(path: Path) -> dict[str, Any]:
    """Read a model file's header alone; raise RunError for a newer format or a foreign file."""
    try:
        with safe_open(path, "pt") as file:
            header = dict(json.loads((file.metadata() or {})[HEADER_KEY]))
        version = int(header["format_version"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise RunError(f"{path}: missing, damaged, or not written by unipelt", REMEDY) from None
    if version > FORMAT:
        raise RunError(
            f"{path}: format {version}, this unipelt reads up to {FORMAT}", "upgrade unipelt"
        )
    return header


def read_tensors(path: Path, expected: Mapping[str, Tensor], sha256: str) -> dict[str, Tensor]:
    """Read stored tensors; every name, shape and number must be what the model expects."""
    tensors, _ = open_tensors(path)
    problem = next(_differences(tensors, expected), None)
    if problem is None and digest(tensors) != sha256:
        problem = "its tensors are not those that were written"
    if problem is not None:
        raise RunError(f"{path}: {problem}", REMEDY)
    return tensors


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted(expected.keys() - found.keys()):
        yield f"tensor {name} is missing"
    for name in sorted(found.keys() - expected.keys()):
        yield f"tensor {name} is not part of this method"
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            yield f"tensor {name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
        elif tensor.dtype != expected[name].dtype:
            kinds = str(tensor.dtype), str(expected[name].dtype).removeprefix("torch.")
            yield f"tensor {name} is {kinds[0]}, not {kinds[1]}"
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield f"tensor {name} holds numbers that are not finite"
