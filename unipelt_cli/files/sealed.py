"""JSON and tensors that say what they are and whether they were changed."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unipelt_cli.errors import RunError
from unipelt_cli.files.atomic import replacing
from unipelt_cli.files.strict import parse_json

FORMAT = 1
SEAL = "sha256"
HEADER_KEY = "unipelt"  # one key: the library writes several in no fixed order
REMEDY = "train the run again with --overwrite"
_UNREADABLE = (
    *(SafetensorError, OSError, ValueError),
    *(AttributeError, KeyError, TypeError),  # other JSON than ours
)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, atomically; the header is one JSON string, and seals them."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sealed = {**header, SEAL: digest(contiguous, header)}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, {HEADER_KEY: json.dumps(sealed, sort_keys=True)})


def with_seal(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a JSON object with the hash of all else in it, by which damage is told."""
    content = {key: item for key, item in value.items() if key != SEAL}
    return content | {SEAL: hashlib.sha256(_canonical(content)).hexdigest()}


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Hash a header, and names, shapes and bytes in the order of the names."""
    total = hashlib.sha256(_canonical(header))
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes: numpy has no bfloat16. A scalar has no bytes to view.
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file of a run; raise RunError when it is not there."""
    try:
        with own_file(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path}: missing or damaged ({error.strerror})", REMEDY) from None


def read_text(path: Path) -> str:
    """Read a file of a run as text; raise RunError when it is missing or not UTF-8."""
    try:
        return own_file(path).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise RunError(f"{path}: missing or damaged", REMEDY) from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise RunError when it is missing or damaged."""
    try:
        value = parse_json(read_text(path))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RunError(f"{path}: missing or damaged", REMEDY)
    return value


def own_file(path: Path) -> Path:
    """Return the path of a regular file; raise RunError for a link out of its directory."""
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise RunError(
            f"{path}: a link that leads out of its directory", "put the file itself there"
        )
    if not path.is_file():
        raise RunError(f"{path}: missing or damaged", REMEDY)
    return path


def open_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Read all tensors and the header of a file that `write_tensors` wrote, and its seal.

    Raises RunError when it is missing, damaged, or foreign.
    """
    header = read_header(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except _UNREADABLE:
        raise _foreign(path) from None
    if digest(tensors, {key: item for key, item in header.items() if key != SEAL}) != header[SEAL]:
        raise RunError(f"{path}: its tensors are not those that were written", REMEDY)
    return tensors, header


def read_header(path: Path) -> Mapping[str, Any]:
    """Read a tensor file's header alone; raise RunError for a newer format or a foreign file."""
    try:
        with safe_open(own_file(path), "pt") as file:
            header = parse_json((file.metadata() or {})[HEADER_KEY])
        version = header.get("format_version", FORMAT)
        if not isinstance(header[SEAL], str) or not isinstance(version, int):
            raise TypeError
    except (
        SafetensorError,
        OSError,
        AttributeError,
        KeyError,
        RecursionError,
        TypeError,
        ValueError,
    ):
        raise _foreign(path) from None
    if version > FORMAT:
        raise RunError(
            f"{path}: format {version}, this unipelt reads up to {FORMAT}", "upgrade unipelt"
        )
    return dict(header)


def _foreign(path: Path) -> RunError:
    return RunError(f"{path}: missing, damaged, or not written by unipelt", REMEDY)


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read stored tensors; every name, shape and number must be what the model expects."""
    tensors, _ = open_tensors(path)
    if problem := next(_differences(tensors, expected), None):
        raise RunError(f"{path}: {problem}", REMEDY)
    return tensors


def _differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted(expected.keys() - tensors.keys()):
        yield f"tensor {name} is missing"
    for name in sorted(tensors.keys() - expected.keys()):
        yield f"tensor {name} is not part of this method"
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            yield f"tensor {name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
        elif tensor.dtype != expected[name].dtype:
            kinds = str(tensor.dtype), str(expected[name].dtype).removeprefix("torch.")
            yield f"tensor {name} is {kinds[0]}, not {kinds[1]}"
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield f"tensor {name} holds numbers that are not finite"
