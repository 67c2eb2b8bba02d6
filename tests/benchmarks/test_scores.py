"""The score table runs contenders on the same rows, keeps each run and goes on from them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from support.data_files import glue
from support.rows import write_rows

from tests.benchmarks import scores
from tests.benchmarks.score_runs import Outcome
from tests.benchmarks.score_table import Standing, Table
from tests.benchmarks.setfit_contender import SetFit
from unipelt_cli.files import sealed
from unipelt_cli.runs.run import read_run

SETTINGS = ("train.epochs=2", "train.batch_size=8", "train.device=cpu", "train.precision=fp32")
SMALL = ["--k", "24", "--dev-size", "10", "--data-seeds", "111,222"]
SMALL += [option for text in SETTINGS for option in ("--set", text)]


@pytest.fixture
def table(bert: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Return a call that makes a table of made-up reviews: the exit code, stdout and stderr."""

    def run(*options: object) -> tuple[int, str, str]:
        given = ["--csv", f"reviews={rows_file}", "--model", bert, "--out", tmp_path / "out"]
        code = scores.main([*SMALL, *map(str, (*given, *options))])
        return code, *capsys.readouterr()

    return run


def preset(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def no_setfit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "setfit", None)  # as where it is not installed


def test_a_table_says_what_its_runs_reached_and_goes_on_where_it_stopped(table, tmp_path) -> None:
    own = preset(tmp_path, "mine", '[method]\nname = "head"\n[train]\nlearning_rate = 0.01\n')
    code, stdout, stderr = table("--contenders", f"lora,{own}", "--json")
    assert code == 0, stderr
    answer = json.loads(stdout)
    stored = {
        (name, seed): read_run(tmp_path / "out" / name / f"reviews-d{seed}")
        for name in ("lora", "mine")
        for seed in (111, 222)
    }
    reached = {at: run.result["test"]["accuracy"] for at, run in stored.items()}
    assert stored["mine", 111].experiment.train.learning_rate == 0.01
    for entry in answer["contenders"]:
        each = [reached[entry["name"], seed] for seed in (111, 222)]
        assert [entry["scores"]["reviews"][seed] for seed in ("111", "222")] == each
        assert entry["mean"] == entry["means"]["reviews"] == pytest.approx(sum(each) / 2)
        assert entry["labels_read"] == [34, 34]
        runs = [stored[entry["name"], seed].result["seconds"] for seed in (111, 222)]
        assert all(0 < own < whole for own, whole in zip(entry["seconds"], runs, strict=True))
    (difference,) = answer["differences"]
    ahead = [reached["mine", seed] - reached["lora", seed] for seed in (111, 222)]
    assert (answer["against"], difference["name"], difference["pairs"]) == ("lora", "mine", 2)
    assert difference["difference"] == pytest.approx(sum(ahead) / 2)
    lines = stderr.splitlines()
    assert f"lora reviews 111: test accuracy {reached['lora', 111]:.3f}, " in stderr
    assert "test scores, bert, k = 24, data seeds 111, 222" in lines
    assert "Ahead of lora, pair by pair over tasks and data seeds" in lines
    assert max(map(len, lines)) <= 80

    shutil.rmtree(tmp_path / "out" / "lora" / "reviews-d222")
    (tmp_path / "out" / "lora" / "reviews-d222.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/result.json")}
    code, stdout, stderr = table("--contenders", f"lora,{own}", "--json")
    assert (code, stderr.count("kept from before"), len(kept)) == (0, 3, 3)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = json.loads(stdout)
    assert [entry["scores"] for entry in again["contenders"]] == [
        entry["scores"] for entry in answer["contenders"]
    ]


def test_dev_scores_say_who_chose_on_these_rows(table, tmp_path) -> None:
    code, stdout, stderr = table("--contenders", "head", "--split", "dev", "--json")
    assert code == 0, stderr
    answer = json.loads(stdout)
    title = "dev scores, bert, k = 24, data seeds 111, 222"
    assert answer["title"] == f"{title}; on these very dev rows head chose their best epoch"
    for seed in ("111", "222"):
        run = read_run(tmp_path / "out" / "head" / f"reviews-d{seed}")
        (entry,) = answer["contenders"]
        assert entry["scores"]["reviews"][seed] == pytest.approx(run.result["dev"]["accuracy"])


def test_predictions_are_kept_that_give_the_scores(table, tmp_path) -> None:
    assert table("--contenders", "head")[0] == 0
    kept = sealed.read_object(tmp_path / "out" / "head" / "reviews-d111.json")
    rows = read_run(tmp_path / "out" / "head" / "reviews-d111").rows
    for split in ("dev", "test"):
        hits = zip(kept["predictions"][split], rows(split)["label"], strict=True)
        right = [answer == label for answer, label in hits]
        assert kept["scores"][split]["accuracy"] == pytest.approx(sum(right) / len(right))


def test_kept_runs_of_other_settings_or_rows_are_refused(table, bert, tmp_path) -> None:
    assert table("--contenders", "head")[0] == 0
    kept = tmp_path / "out" / "head" / "reviews-d111.json"
    code, stdout, stderr = table("--contenders", "head", "--set", "train.epochs=3")
    told = f"error: {kept}: was run with other settings\nhint: give another --out\n"
    assert (code, stdout, stderr) == (2, "", told)
    others = write_rows(tmp_path / "others.csv", start=100)
    code, stdout, stderr = table("--contenders", "head", "--csv", f"others={others}")
    assert code == 0, stderr
    write_rows(others, start=101)
    kept = kept.with_name("others-d111.json")
    _, _, stderr = table("--contenders", "head", "--csv", f"others={others}")
    assert stderr.splitlines()[-2:] == [
        f"error: {kept}: was run with other rows",
        "hint: give another --out",
    ]


def test_a_preset_that_draws_its_own_rows_is_refused(table, tmp_path) -> None:
    own = preset(tmp_path, "mine", '[method]\nname = "head"\n[data]\nk = 12\n')
    assert table("--contenders", own) == (
        2,
        "",
        "error: mine: its settings draw other train rows than the table's\n"
        "hint: leave out what it sets in [data]: all contenders read the same rows\n",
    )


def test_who_cannot_take_part_is_named_and_ranks_nobody(table, tmp_path, monkeypatch) -> None:
    no_setfit(monkeypatch)
    monkeypatch.setattr(scores, "CONTENDERS", (*scores.CONTENDERS, "of-tomorrow"))
    code, stdout, stderr = table("--contenders", "setfit,head,of-tomorrow", "--json")
    assert code == 0, stderr
    answer = json.loads(stdout)
    assert answer["notes"] == [
        "of-tomorrow: left out, this version has no such method",
        "setfit: left out, `import setfit` fails (import of setfit halted; None in sys.modules)",
    ]
    assert [entry["mean"] is None for entry in answer["contenders"]] == [True, False, True]
    assert (answer["averaged"], answer["against"]) == (["reviews"], "head")


def test_runs_of_setfit_that_were_kept_stand_where_it_is_missing(
    table, bert, rows_file, tmp_path, monkeypatch
) -> None:
    no_setfit(monkeypatch)
    chosen = scores.options([*SMALL, "--csv", f"reviews={rows_file}"])
    for seed in chosen.data_seeds:
        rows = scores.draw("reviews", scores.tasks_of(chosen)["reviews"], chosen, seed)
        labels = {split: rows.prepared.splits[split]["label"] for split in ("dev", "test")}
        kept = Outcome(
            recipe=SetFit(str(bert)).recipe(rows),
            packages={"setfit": "1.2.0"},
            digests=rows.digests,
            scores={split: {"accuracy": 1.0} for split in labels},
            predictions={split: list(own) for split, own in labels.items()},
            seconds=7.0,
            inference_seconds=1.0,
            labels_read=24,
            selected_on_dev=False,
        )
        path = tmp_path / "out" / "setfit" / f"reviews-d{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(kept.model_dump_json())
    # It read no dev row: another number of them for the others makes no other run of it.
    code, stdout, stderr = table("--contenders", "setfit", "--dev-size", "9", "--json")
    assert code == 0, stderr
    (entry,) = json.loads(stdout)["contenders"]
    assert (entry["mean"], entry["seconds"], entry["labels_read"]) == (1.0, [7.0] * 2, [24] * 2)
    code, _, stderr = table("--contenders", "setfit", "--dev-size", "9", "--split", "dev")
    path = tmp_path / "out" / "setfit" / "reviews-d111.json"
    told = f"error: {path}: was run with other rows\nhint: give another --out\n"
    assert (code, stderr) == (2, told)


def test_an_interrupted_table_says_how_to_go_on(table, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scores, "run_and_keep", stop)
    told = "interrupted: the same command goes on from here\n"
    assert table("--contenders", "head") == (130, "", told)


def test_setfit_is_offered_no_values(bert, tmp_path, monkeypatch, capsys) -> None:
    no_setfit(monkeypatch)
    source = glue(tmp_path / "glue", "stsb")
    options = ["--source", source, "--tasks", "stsb", "--contenders", "setfit", "--model", bert]
    assert scores.main([*SMALL, *map(str, (*options, "--out", tmp_path / "out")), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["notes"] == ["setfit: no stsb, it has no regression"]


def test_a_task_of_glue_is_drawn_from_its_directory(bert, tmp_path, capsys) -> None:
    source = glue(tmp_path / "glue", "rte")
    options = ["--source", source, "--tasks", "rte", "--contenders", "head", "--model", bert]
    assert scores.main([*SMALL, *map(str, (*options, "--out", tmp_path / "out"))]) == 0
    capsys.readouterr()
    run = read_run(tmp_path / "out" / "head" / "rte-d222")
    assert (run.task.name, run.count_of("train"), run.count_of("dev")) == ("rte", 24, 10)


def test_no_mean_gains_by_a_task_left_out_or_a_seed_missing() -> None:
    full = Standing("full", 2, {"hard": {1: 0.4, 2: 0.6}, "easy": {1: 0.9, 2: 0.9}})
    part = Standing("part", 2, {"hard": {1: 0.9}, "easy": {1: 0.8, 2: 1.0}})
    table = Table("", "test", ("hard", "easy"), (full, part), "full")
    assert table.averaged == ("easy",)
    assert [own.mean(table.averaged) for own in (full, part)] == [0.9, 0.9]
    assert (full.mean(["hard"]), part.mean(["hard"])) == (0.5, None)
    (distance,) = table.distances()  # `hard` has one pair, and shows no spread
    assert (distance.tasks, distance.pairs, distance.p) == (("easy",), 2, 1.0)
    assert distance.interval is not None
    assert sum(distance.interval) == pytest.approx(2 * distance.difference, abs=1e-12)


def test_one_seed_has_a_difference_and_no_interval() -> None:
    standings = [
        Standing(name, 1, {"easy": {1: score}}) for name, score in (("a", 0.5), ("b", 0.75))
    ]
    (distance,) = Table("", "test", ("easy",), tuple(standings), "a").distances()
    assert (distance.difference, distance.interval, distance.p) == (0.25, None, None)
