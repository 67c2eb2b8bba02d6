"""Check a backbone's files as plain data, before any class of a library sees them.

A folder from elsewhere may name code to run or files to read, and may claim sizes that nothing
in it has. What its architecture does not know is left out; what it knows must be sound.
"""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.config_keys import SAVED, theta_problem
from unipelt_cli.backbones.layout import Layout
from unipelt_cli.errors import BackboneError
from unipelt_cli.files.strict import parse_json
from unipelt_cli.system import imports
from unipelt_cli.text import shown

JSON_LIMIT = 10_000_000
HEADER_LIMIT = 100_000_000
MOST_LAYERS, MOST_HEADS, LARGEST_SIZE = 256, 4096, 2**31 - 1
AGAIN = "download or save it again"

_RUNS_CODE = ("auto_map", "trust_remote_code", "custom_pipelines", "quantization_config")
_KERNELS = ("use_kernels", "kernel_config", "hub_kernels")
_REFUSED = re.compile("|".join((r"_attn_implementation(_internal)?", *_RUNS_CODE, *_KERNELS)))
# Most files of a tokenizer are found by their names: a setting could name any file there is. This
# one is never opened, and many tokenizers keep where their author's lay.
_FILES = re.compile(r"(?!special_tokens_map_file$)\w+_file")
_NOT_SETTINGS = ("self", "kwargs", "num_labels")
_COMMON: Mapping[str, object] = {
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"), None),
    "cls_token_id": None,
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",
    "chunk_size_feed_forward": 0,
    **dict.fromkeys(("is_decoder", "add_cross_attention"), False),
}
_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}

BACKEND = "TokenizersBackend"  # what transformers 5 calls a PreTrainedTokenizerFast

Shapes = Mapping[str, tuple[int, ...]]


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object of a backbone's folder; raise BackboneError for anything else."""
    value = _read(path)
    if not isinstance(value, dict):
        raise BackboneError(f"{path}: not a JSON object", AGAIN)
    return value


def read_list(path: Path) -> list[Any]:
    """Read a JSON list of a backbone's folder; raise BackboneError for anything else."""
    value = _read(path)
    if not isinstance(value, list):
        raise BackboneError(f"{path}: not a JSON list", AGAIN)
    return value


def _read(path: Path) -> object:
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise BackboneError(f"{path}: larger than a config can be", "download it again")
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise BackboneError(f"{path}: cannot be read ({reason})", AGAIN) from None


def check_keys(config: Mapping[str, Any], path: Path) -> None:
    """Refuse keys, at any depth, that make a library fetch or run something."""
    for key, value in _pairs(config):
        if _REFUSED.fullmatch(key) and value not in (None, False, {}):
            raise BackboneError(
                f"{path}: holds {key}, which can make a library fetch or run code",
                "remove the key if you trust the file, or choose another backbone",
            )


def check_tokenizer(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a tokenizer_config.json that names code, other files, or an unknown class."""
    check_keys(config, path)
    for key, value in config.items():
        if _FILES.fullmatch(key) and isinstance(value, str):
            raise BackboneError(
                f"{path}: holds {key} = {value!r}, and only files of known names are read",
                "remove the key, and put the file beside the config",
            )
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key)
        if isinstance(value, list) and not all(map(_is_token, value)):
            raise BackboneError(
                f"{path}: {key} = {shown(value)} is not a list of tokens",
                "save it again with save_pretrained of a fast tokenizer",
            )
    name = config.get("tokenizer_class")
    if name is not None and name not in tuple(_tokenizer_classes()):
        raise BackboneError(
            f"{path}: tokenizer_class = {name!r} is not that of a supported architecture",
            "save it again with save_pretrained of a fast tokenizer",
        )


def _is_token(value: object) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _tokenizer_classes() -> set[str]:
    names = {f"{layout.classes}Tokenizer" for layout in BACKBONES.values()}
    return {*names, *(f"{name}Fast" for name in names), "PreTrainedTokenizerFast", BACKEND}


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            yield from _pairs(item)


def settings(config: Mapping[str, Any], layout: Layout, path: Path) -> Mapping[str, Any]:
    """Return the settings that an architecture knows; raise BackboneError for one it cannot have.

    Each must be of the type that the library's own default has, and of a size that can be.
    """
    signature = inspect.signature(_config_class(layout).__init__).parameters
    known = {
        name: parameter.default
        for name, parameter in signature.items()
        if name not in _NOT_SETTINGS
    }
    known = {**_COMMON, **known, **layout.also_read}
    known_settings = {
        key: value
        for key, value in config.items()
        if key in known and (value is not None or known[key] is None or key.endswith("_token_id"))
    }
    for key, value in known_settings.items():
        if value is not None and (problem := _problem(key, value, known[key])):
            written = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
            raise BackboneError(
                f"{path}: {key} = {written} is not {problem}",
                SAVED,
            )
    return known_settings


def _config_class(layout: Layout) -> Any:
    return getattr(imports.transformers(), f"{layout.classes}Config")


def _problem(key: str, value: Any, default: object) -> str | None:
    """Say what a setting should be, where it is not."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if key.endswith("_token_id"):
        return None if _is_whole(value) and 0 <= value <= LARGEST_SIZE else "a token's number"
    if "dropout" in key or key.endswith("_prob") or key.endswith("layerdrop"):
        return None if _is_number(value) and 0 <= value < 1 else "a share below 1"
    if key.endswith(("_eps", "_epsilon")):
        return None if _is_number(value) and 0 < value < 1 else "a small number"
    if isinstance(default, int):
        return _size_problem(key, value, default)
    if key.endswith("rope_theta"):
        return theta_problem(value)
    if isinstance(default, float):
        return None if _is_number(value) else "a number"
    if isinstance(default, str):
        return None if isinstance(value, str) else "a name"
    parts = value if isinstance(value, list) else [value]
    return None if all(isinstance(p, str | int | float) for p in parts) else "a plain value"


def _size_problem(key: str, value: Any, default: int) -> str | None:
    most = LARGEST_SIZE
    if "layers" in key or "group" in key:
        most = MOST_LAYERS
    elif "heads" in key:
        most = MOST_HEADS
    least = min(default, 0) if default <= 0 or key == "type_vocab_size" else 1
    if _is_whole(value) and least <= value <= most:
        return None
    return f"a whole number from {least} to {most}"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def read_shapes(path: Path) -> Shapes:
    """Return the shapes of a safetensors file's tensors from its header alone.

    Raises BackboneError for a file whose header is not whole, says other sizes than the file has,
    or holds tensors that are not numbers of a plain kind.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        header.pop("__metadata__", None)
        return {
            name: _shape(name, description, size - 8 - length)
            for name, description in header.items()
        }
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: the weights cannot be read ({error})", AGAIN) from None


def _shape(name: str, description: Any, room: int) -> tuple[int, ...]:
    """Return one tensor's shape; raise ValueError where type, shape and place do not agree."""
    if not isinstance(description, dict) or description.get("dtype") not in _TYPES:
        raise ValueError(f"tensor {name[:80]!r} is of no plain type")
    shape, offsets = _numbers(description.get("shape")), _numbers(description.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(f"tensor {name[:80]!r} has no shape or place")
    size = math.prod(shape) * _TYPES[description["dtype"]]
    if offsets[1] - offsets[0] != size or offsets[1] > room:
        raise ValueError(f"tensor {name[:80]!r} is not where its header says")
    return shape


def _numbers(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(_is_whole(number) and number >= 0 for number in value):
        return tuple(value)
    return None


def check_sizes(config: Any, shapes: Shapes, path: Path) -> None:
    """Raise BackboneError for a config, as the library reads it, of more than the weights hold.

    A library makes what a config says before it looks at the weights.
    """
    numbers = sum(map(math.prod, shapes.values()))
    largest = max((side for shape in shapes.values() for side in shape), default=0)
    width = config.hidden_size
    inner = next(
        (getattr(config, name) for name in _INNER if getattr(config, name, None) is not None), width
    )
    embedding = min(width, getattr(config, "embedding_size", None) or width)
    has_positions = any("position" in name for name in shapes)
    positions = getattr(config, "max_position_embeddings", None) or 0
    claims = {
        "hidden_size": (width, largest),
        "vocab_size": (config.vocab_size, largest),
        "vocab_size x embedding": (config.vocab_size * embedding, numbers),
        "feed-forward size": (inner, largest),
        "feed-forward size x hidden_size": (inner * width, numbers),
        "max_position_embeddings": (positions, largest if has_positions else 2**20),
    }
    for name, (claimed, available) in claims.items():
        if claimed > available:
            raise BackboneError(
                f"{path}: {name} is {claimed}, more than the weights beside it hold",
                SAVED,
            )


_INNER = ("intermediate_size", "hidden_dim", "d_ff", "encoder_ffn_dim")
