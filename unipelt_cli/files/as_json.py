"""Frozen values as the JSON that scripts read: a field is a key, in the fields' order."""

from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from typing import Any

_KEY, _INLINE, _OPTIONAL = "json_key", "json_inline", "json_optional"


def keyed(key: str) -> Any:
    """Declare a field that JSON calls otherwise than the code does."""
    return field(metadata={_KEY: key})


def inline() -> Any:
    """Declare a field whose mapping's keys stand in the object itself, at the field's position."""
    return field(metadata={_INLINE: True})


def optional() -> Any:
    """Declare a field that is None by default, and then is no key at all."""
    return field(default=None, metadata={_OPTIONAL: True})


def as_json(value: object) -> Any:
    """Return dataclasses, mappings and sequences as dictionaries and lists, all else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return _object(value)
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [as_json(item) for item in value]
    return value


def _object(instance: Any) -> Mapping[str, Any]:
    result = {}
    for attribute in fields(instance):
        value = getattr(instance, attribute.name)
        if attribute.metadata.get(_OPTIONAL) and value is None:
            continue
        if attribute.metadata.get(_INLINE):
            result.update(as_json(value))
        else:
            result[attribute.metadata.get(_KEY, attribute.name)] = as_json(value)
    return result
