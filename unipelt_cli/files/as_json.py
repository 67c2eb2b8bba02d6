"""Frozen values as the JSON that scripts read: a field is a key, in the fields' order.

What JSON says otherwise than the code a field declares by its metadata.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

_KEY = "json_key"
INLINE: Mapping[str, bool] = MappingProxyType({"json_inline": True})
"""The field's mapping has its keys in the object itself, at the field's position."""
OPTIONAL: Mapping[str, bool] = MappingProxyType({"json_optional": True})
"""Where the field is None there is no such key."""
LEFT_OUT: Mapping[str, bool] = MappingProxyType({"json_left_out": True})
"""JSON says the field by where its object stands."""


def keyed(key: str) -> Mapping[str, str]:
    """Return the metadata of a field that JSON calls otherwise than the code does."""
    return {_KEY: key}


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
    for declared in fields(instance):
        value, metadata = getattr(instance, declared.name), declared.metadata
        if metadata == LEFT_OUT or (metadata == OPTIONAL and value is None):
            continue
        if metadata == INLINE:
            result.update(as_json(value))
        else:
            result[metadata.get(_KEY, declared.name)] = as_json(value)
    return result
