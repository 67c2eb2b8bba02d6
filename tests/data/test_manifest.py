"""A manifest describes its rows, the same bytes for the same rows."""

import json

import numpy as np
import pyarrow as pa
from datasets import Dataset
from support.data_files import glue, prepare_glue, prepare_own, write

from unipelt_cli.data.manifest import digest_rows
from unipelt_cli.data.prepared_directory import save_prepared

# The manifest


def test_the_manifest_describes_the_rows(tmp_path):
    texts = ["Same  Text", "same text", "SAME TEXT", "one", "two three four", "five six"]
    lines = [f"{text},{label}" for text, label in zip(texts, "aababa", strict=True)]
    path = write(tmp_path / "a.csv", "\n".join(["text,label", *lines]))
    dev = write(tmp_path / "dev.csv", "text,label\none,a\nnew,a\n")
    test = write(tmp_path / "test.csv", "text,label\none,b\nONE,b\nnew,a\n")
    prepared = prepare_own(path, dev_file=str(dev), test_file=str(test))
    manifest = prepared.manifest
    assert manifest["format"] == 1
    assert manifest["task"] == "a"
    assert manifest["source"] == {
        "kind": "files",
        "train": str(path),
        "dev": str(dev),
        "test": str(test),
        "text": ["text"],
        "label": "label",
    }
    assert (manifest["k"], manifest["data_seed"], manifest["dev_size"]) == (None, 111, 1000)
    train = manifest["splits"]["train"]
    assert train["rows"] == 6
    assert train["row_ids"] == np.random.default_rng(111).permutation(6).tolist()
    assert train["labels"] == {"a": 4, "b": 2}
    assert train["words"] == {"min": 1, "p25": 2, "p50": 2, "p75": 2, "p95": 2, "max": 3}
    assert train["duplicates"] == 2
    assert train["digest"] == digest_rows(prepared.splits["train"])
    assert manifest["leakage"] == {"train_dev": 1, "train_test": 2, "dev_test": 3}
    assert manifest["conflicts"] == 2
    assert manifest["notes"] == []


def test_two_preparations_are_the_same_bytes(tmp_path):
    glue(tmp_path / "glue", "stsb")
    for name in ("one", "two"):
        prepared = prepare_glue(tmp_path / "glue", "stsb", k=20, dev_size=10)
        save_prepared(prepared, tmp_path / name)
    for name in ("manifest.json", "train.arrow", "dev.arrow", "test.arrow"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = (tmp_path / "one/manifest.json").read_text(encoding="utf-8")
    assert text == (
        json.dumps(prepared.manifest, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    )


def test_the_digest_sees_content_and_order_but_not_chunks():
    table = pa.table({"text": ["a", "b", "c"], "label": [0, 1, 0], "row": [0, 1, 2]})
    whole = Dataset(table)
    pieces = Dataset(pa.concat_tables([table.slice(0, 1), table.slice(1)]))
    assert digest_rows(whole) == digest_rows(pieces)
    assert digest_rows(whole) == digest_rows(Dataset(table.set_column(2, "row", [[7, 8, 9]])))
    assert digest_rows(whole) != digest_rows(whole.select([1, 0, 2]))
    assert digest_rows(whole) != digest_rows(Dataset(table.set_column(1, "label", [[0, 1, 1]])))
    assert digest_rows(whole) != digest_rows(
        Dataset(table.set_column(0, "text", [["a", "bc", ""]]))
    )
