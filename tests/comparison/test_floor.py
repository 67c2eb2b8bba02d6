"""The floor of all methods among compared runs."""

import json
from pathlib import Path

import pytest
from support.command import invoke
from support.finished_runs import answer_of, forge
from support.runs import reseal

from unipelt_cli.errors import RunError
from unipelt_cli.files import atomic
from unipelt_cli.runs.names import RESULT
from unipelt_cli.runs.run import read_run


def note_floor(directory: Path, score: float) -> None:
    path = directory / RESULT
    result = json.loads(path.read_text())
    scores = {result["metric"]: score}
    atomic.write_json(path, {**result, "probe": {"dev": scores, "test": scores}})
    reseal(directory)


def test_the_floor_that_runs_noted_is_a_line_of_the_table(tmp_path: Path) -> None:
    for seed, floor in ((111, 0.5), (222, 0.6)):
        for method in ("lora", "full"):
            note_floor(forge(tmp_path / f"{method}-{seed}", method, 0.8, seed=seed), floor)
    (table,) = answer_of(tmp_path)["tables"]
    assert table["floor"] == {
        **{"method": "probe", "of": "notes"},
        **{"means": {"sst2": pytest.approx(0.55)}, "average": pytest.approx(0.55)},
    }
    _, shown, _ = invoke("compare", tmp_path)
    assert [line.split() for line in shown.splitlines() if line.startswith("(probe)")] == [
        ["(probe)", "0.5500"]
    ]
    assert "(probe): what the runs noted of it on their rows" in " ".join(shown.split())


def test_the_floors_own_runs_stand_for_it(tmp_path: Path) -> None:
    note_floor(forge(tmp_path / "lora", "lora", 0.8), 0.5)
    forge(tmp_path / "probe", "probe", 0.7)
    (table,) = answer_of(tmp_path)["tables"]
    assert (table["floor"]["of"], table["floor"]["means"]) == ("runs", {"sst2": 0.7})
    assert "(probe)" not in invoke("compare", tmp_path)[2]


def test_a_floor_without_the_runs_metric_is_damage(tmp_path: Path) -> None:
    run = forge(tmp_path / "lora", "lora", 0.8)
    path = run / RESULT
    atomic.write_json(path, {**json.loads(path.read_text()), "probe": {"test": {"f1": 0.5}}})
    reseal(run)
    with pytest.raises(RunError, match="no 'accuracy' among the scores"):
        read_run(run)
