"""Frozen values become the JSON that scripts read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unipelt_cli.files.as_json import INLINE, LEFT_OUT, OPTIONAL, as_json, keyed


@dataclass(frozen=True)
class Mean:
    layer: int = field(metadata=LEFT_OUT)
    mean: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    rows: int
    name: str = field(metadata=keyed("class"))
    note: str | None = field(default=None, metadata=OPTIONAL)
    gates: Mapping[str, Mean] = field(metadata=INLINE)
    means: Sequence[Mean]


def test_keys_stand_in_the_order_of_the_fields() -> None:
    report = Report(rows=2, name="x", gates={"b": Mean(1, 0.5)}, means=(Mean(2, None),))
    assert json.dumps(as_json({"of": report})) == (
        '{"of": {"rows": 2, "class": "x", "b": {"mean": 0.5}, "means": [{"mean": null}]}}'
    )


def test_an_optional_field_is_a_key_where_it_is_known() -> None:
    report = Report(rows=0, name="x", note="", gates={}, means=())
    assert json.dumps(as_json(report)) == '{"rows": 0, "class": "x", "note": "", "means": []}'
