"""Rows that lack a text or a label: refused with the way out, left out, or answered with null."""

import json
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.command import FAST, error_of, invoke
from support.data_files import prepare_own, write
from support.rows import sentence, write_rows, write_table

from unipelt_cli.data.sources import find
from unipelt_cli.errors import DataError

SKIP = ("--set", "data.skip_unusable=true")


def gaps(path: Path) -> Path:
    """Write sixty rows, of which two have no text and one has no label."""
    holes = {3: ",yes", 20: " ,no", 40: "the film,"}
    return write_table(
        path, "text,label", lambda n: holes.get(n, f"{sentence(n)},{('yes', 'no')[n % 2]}")
    )


def test_the_first_row_that_cannot_be_used_is_told_with_the_way_out(tmp_path: Path) -> None:
    path = gaps(tmp_path / "a.csv")
    assert error_of("prepare", "--train-file", path, "--text", "text", "--label", "label") == (
        f"{path}, line 42: the label is missing",
        "fill it in, or leave such rows out with --set data.skip_unusable=true",
    )


def test_rows_without_a_text_or_label_are_left_out_and_counted(tmp_path: Path) -> None:
    path, out = gaps(tmp_path / "a.csv"), tmp_path / "ready"
    code, stdout, stderr = invoke(
        "prepare", "--train-file", path, *SKIP, "--out", out, "--json"
    )  # fmt: skip
    assert code == 0, stderr
    answer = json.loads(stdout)
    note = f"{path}: rows without a text or label left out: 3 (lines 5, 22, 42)"
    assert note in answer["notes"]
    assert sum(split["rows"] for split in answer["splits"].values()) == 57
    used = [row for split in answer["splits"].values() for row in split["row_ids"]]
    assert sorted(used) == [n for n in range(60) if n not in (3, 20, 40)]


def test_a_file_of_nothing_but_such_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n,a\nb,\n")
    given = ("prepare", "--train-file", path, "--text", "text", "--label", "label", *SKIP)
    assert error_of(*given) == (
        f"{path}: none of 2 rows has a text and a label",
        "name the right columns with --text and --label",
    )
    assert error_of("train", "--task", "demo", *SKIP, "--dry-run") == (
        "data.skip_unusable = true: only own rows can lack a text or label",
        "drop it, or give --train-file FILE",
    )


def test_a_pair_with_one_empty_text_is_a_row_and_one_with_none_is_not(tmp_path: Path) -> None:
    rows = [{"a": f"a {n}", "b": f"b {n}", "label": "xy"[n % 2]} for n in range(10)]
    rows[2]["a"], rows[3]["b"] = "", None
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    pair = {"text": "a", "text_pair": "b"}
    splits = prepare_own(path, **pair).splits.values()
    texts = {row["row"]: (row["a"], row["b"]) for split in splits for row in split}
    assert (texts[2], texts[3]) == (("", "b 2"), ("a 3", ""))
    rows[3]["a"] = " "
    write(path, "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"line 4: 'a' and 'b' are both empty"):
        prepare_own(path, **pair)
    kept = prepare_own(path, **pair, skip_unusable=True)
    assert f"{path}: rows without a text or label left out: 1 (line 4)" in kept.manifest["notes"]


@pytest.fixture(scope="module")
def lenient(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was trained with the setting."""
    folder = tmp_path_factory.mktemp("lenient")
    path, out = gaps(folder / "a.csv"), folder / "run"
    given = ("--train-file", path, "--k", "24", "--model", bert, *FAST, *SKIP)
    assert invoke("train", *given, "--out", out)[0] == 0
    return out


def test_predict_answers_null_for_a_row_without_text(
    run: Path, lenient: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "new.csv", 'id,text\n1,fine\n2,""\n3,good film\n')
    code, stdout, stderr = invoke("predict", run, path)
    assert (code, len(stdout.splitlines())) == (2, 1)
    assert stderr.splitlines() == [
        f"error: {path}, line 3: 'text' is empty",
        "hint: fill it in, or have such rows answered with null by --skip-unusable",
    ]
    for given in ((run, path, "--skip-unusable"), (lenient, path)):
        code, stdout, stderr = invoke("predict", *given)
        assert (code, stderr) == (0, "")
        rows = [json.loads(line) for line in stdout.splitlines()]
        assert rows[1] == {"label": None, "probabilities": None}
        assert [row["label"] in ("yes", "no") for row in rows] == [True, False, True]
    both = ("--run", run, "--run", lenient, "--skip-unusable")
    answer = [json.loads(line) for line in invoke("predict", *both, path)[1].splitlines()]
    assert answer[1] == {"runs": {p.name: rows[1] for p in (run, lenient)}}
    empty = write(tmp_path / "none.jsonl", '{"text": null}\n{"text": " "}\n')
    code, stdout, _ = invoke("predict", run, empty, "--skip-unusable")
    assert (code, [json.loads(line) for line in stdout.splitlines()]) == (0, [rows[1]] * 2)


def test_eval_passes_over_what_training_passed_over(
    run: Path, lenient: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.csv", 6)
    path.write_text(path.read_text() + ",yes\nfine,\n")
    assert error_of("eval", run, "--file", path) == (
        f"{path}, line 9: the label is missing",
        "fill it in, or pass over such rows with --skip-unusable",
    )
    for given in ((run, "--skip-unusable"), (lenient,)):
        code, stdout, stderr = invoke("eval", *given, "--file", path, "--json")
        assert (code, json.loads(stdout)["rows"]) == (0, 6)
        note = f"note: {path}: rows without a text or label left out: 2 (lines 8, 9)"
        assert note in stderr.splitlines()


# What Parquet and JSON hold labels in


def test_a_list_of_one_label_is_that_label(tmp_path: Path) -> None:
    rows = [{"text": f"t {n}", "label": ["ab"[n % 2]]} for n in range(12)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert prepare_own(path).task.labels == ("a", "b")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert prepare_own(tmp_path / "a.parquet").task.labels == ("a", "b")
    rows[4]["label"] = ["a", "b"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 4: 2 labels in one row"):
        prepare_own(tmp_path / "a.parquet")


def test_names_of_labels_are_taken_from_the_metadata_of_datasets(run: Path, tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])}
    )
    content = {"text": [f"t {n}" for n in range(12)], "label": [0, 1] * 6}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(path))
    found = prepare_own(path)
    assert found.task.labels == ("no", "yes")
    assert sum(split["labels"]["yes"] for split in found.manifest["splits"].values()) == 6
    code, stdout, stderr = invoke("eval", run, "--file", path, "--json")
    assert (code, json.loads(stdout)["rows"]) == (0, 12), stderr
    content["label"][7] = None  # as an unlabelled row is stored
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(path))
    with pytest.raises(DataError, match=r"row 7: the label is missing"):
        prepare_own(path)
    assert len(find_rows(path)) == 11


def find_rows(path: Path) -> list[int]:
    from unipelt_cli.config.sections import DataSettings

    settings = DataSettings(train_file=str(path), text="text", label="label", skip_unusable=True)
    return find(settings).rows["train"]["row"]


@pytest.mark.parametrize(("values", "labels"), [(("1.10", "2.0", "7.3"), ()), (("1", "2"), ("1", "2"))])  # fmt: skip  # noqa: E501
def test_decimals_of_parquet_are_labels(
    tmp_path: Path, values: tuple[str, ...], labels: tuple[str, ...]
) -> None:
    column = pa.array([Decimal(values[n % len(values)]) for n in range(12)], pa.decimal128(9, 2))
    table = pa.table({"text": [f"t {n}" for n in range(12)], "label": column})
    pq.write_table(table, tmp_path / "a.parquet")
    kind = "auto" if labels else "regression"
    assert prepare_own(tmp_path / "a.parquet", kind=kind).task.labels == labels
