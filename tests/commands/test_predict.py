"""The command `predict`."""

import json
from pathlib import Path

import pytest
from support.command import error_of, invoke


def test_predict_gives_one_object_a_row_in_the_order_of_the_input(
    run: Path, tmp_path: Path
) -> None:
    texts = ["the film was good", "awful", "the cat sat on the red mat and ran " * 5]
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, stdout, stderr = invoke("predict", run, path)
    assert (code, stderr) == (0, "")
    rows = [json.loads(line) for line in stdout.splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row.keys() == {"label", "probabilities"}
        assert row["probabilities"].keys() == {"no", "yes"}
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    alone = [json.loads(invoke("predict", run, "-", stdin=text + "\n")[1]) for text in texts]
    for one, other in zip(rows, alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_columns_that_are_kept_stand_beside_their_rows_answers(run: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("id,text,when\n7,good film,monday\n8,,tuesday\n9,awful plot,\n")
    kept = ("--keep", "id", "--keep", "when", "--skip-unusable")
    code, lines, stderr = invoke("predict", run, rows, *kept)
    assert code == 0, stderr
    answers = [json.loads(line) for line in lines.splitlines()]
    assert [(a["id"], a["when"], a["label"] is None) for a in answers] == [
        ("7", "monday", False),
        ("8", "tuesday", True),
        ("9", "", False),
    ]
    _, plain, _ = invoke("predict", run, rows, "--skip-unusable")
    bare = [{k: v for k, v in a.items() if k not in ("id", "when")} for a in answers]
    assert bare == [json.loads(line) for line in plain.splitlines()]
    objects = '{"id": 7, "text": "good film", "x": 1}\n{"id": null, "text": "fine"}\n'
    _, lines, _ = invoke("predict", run, "-", "--keep", "id", stdin=objects)
    assert [json.loads(line)["id"] for line in lines.splitlines()] == [7, None]


@pytest.mark.parametrize(
    ("column", "message", "hint"),
    [
        ("ids", "FILE: no column 'ids'", "columns found: 'text', 'label'"),
        ("label", "--keep label: answers have this name themselves", "rename it"),
    ],
)
def test_columns_that_cannot_be_kept_are_said(
    run: Path, rows_file: Path, column: str, message: str, hint: str
) -> None:
    found = error_of("predict", run, rows_file, "--keep", column)
    assert found[0] == message.replace("FILE", str(rows_file))
    assert found[1].startswith(hint)
