"""The command `recommend`."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.backbones import Backbones
from support.candidates import by_folds, on_dev
from support.command import error_of, invoke
from support.rows import write_rows

from unipelt_cli.config.experiment import resolve
from unipelt_cli.config.presets import read_preset
from unipelt_cli.runs.run import read_run
from unipelt_cli.sweeps.selection import HALF_A_POINT
from unipelt_cli.terminal.search import floor_verdict
from unipelt_cli.training.planning import RowCache


@pytest.fixture
def own_rows(rows_file: Path, tmp_path: Path) -> list[str]:
    """Return a command on own rows, of which nothing is held back, that trains two epochs."""
    return [
        *("recommend", "--train-file", str(rows_file), "--text", "text", "--label", "label"),
        *("--set", "train.epochs=2", "--device", "cpu", "--out", str(tmp_path / "chosen")),
    ]


@pytest.fixture
def few(own_rows: list[str], backbone_dir: Backbones) -> list[str]:
    """Return a command on own rows and one backbone, with two methods and two rates."""
    return [
        *(*own_rows, "--model", str(backbone_dir("bert")), "--methods", "head,lora"),
        *("--recipes", "default", "--rates", "1e-3,5e-3"),
    ]


def test_the_command_leaves_preset_evidence_and_a_run_that_saw_test_once(
    few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    encode = RowCache.encode

    def watched(self: Any, tuned: Any, prepared: Any, split: str, experiment: Any) -> Any:
        seen.append(split)
        return encode(self, tuned, prepared, split, experiment)

    monkeypatch.setattr(RowCache, "encode", watched)
    code, stdout, stderr = invoke(*few, "--folds", "none", "--json")
    assert code == 0, stderr
    assert seen.count("test") == 1
    assert seen[-1] == "test"
    answer = json.loads(stdout)
    assert (answer["judged_by"], answer["folds"], answer["rows"]) == ("dev", 0, 12)
    assert not answer["score_is_of_rows_that_chose"]
    assert "also chose among" not in stderr
    assert len(answer["candidates"]) == 5
    assert answer["floor"] in answer["candidates"]
    assert answer["floors"] == [answer["floor"]]
    assert (answer["floor"]["method"], answer["floor"]["learning_rate"]) == ("probe", None)
    assert answer["floor"]["rungs"] == 3, "it stays to the end"
    chosen = answer["candidates"][0]
    assert chosen == answer["chosen"]
    run = read_run(tmp_path / "chosen" / "run")
    assert run.result == answer["result"]
    assert run.experiment.method_name == chosen["method"]
    preset = read_preset(answer["preset"])
    assert preset.get("train", {}).get("learning_rate") == chosen["learning_rate"]
    assert json.loads((tmp_path / "chosen" / "evidence.json").read_text())["chosen"] == chosen
    lines = stderr.splitlines()
    assert lines[0] == "5 candidates, 10 min in all: dev alone decides, test is not looked at"
    assert lines[1] == f"round 1  probe: accuracy {answer['floor']['score']:.4f} after epoch 1"
    assert error_of(*few, "--folds", "none")[0] == f"{tmp_path / 'chosen'}: exists already"


@pytest.fixture(scope="module")
def on_two_backbones(
    backbone_dir: Backbones, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[str], Path]:
    """Return what a search by folds on two backbones answers, its talk at 80 columns, its files."""
    out = tmp_path_factory.mktemp("two") / "chosen"
    backbones = f"{backbone_dir('bert')},{backbone_dir('distilbert')}"
    code, stdout, stderr = invoke(
        *("recommend", "--train-file", rows_file, "--text", "text", "--label", "label"),
        *("--models", backbones, "--methods", "head,lora", "--rates", "5e-3", "--device", "cpu"),
        *("--recipes", "default,few-labels", "--set", "train.epochs=2", "--out", out, "--json"),
    )
    assert code == 0, stderr
    return json.loads(stdout), stderr.splitlines(), out


def test_without_dev_rows_folds_decide_on_every_backbone(
    on_two_backbones: tuple[dict[str, Any], list[str], Path], backbone_dir: Backbones
) -> None:
    answer, lines, _ = on_two_backbones
    assert lines[0] == (
        "8 candidates, 10 min in all: 3 folds of the 60 train rows decide, no test row does"
    )
    assert [line.rpartition(":")[0] for line in lines[1:9]] == [
        "round 1  probe on bert",
        "round 1  head at 0.005 on bert",
        "round 1  lora at 0.005 on bert",
        "round 1  probe on distilbert",
        "round 1  head at 0.005 on distilbert",
        "round 1  lora at 0.005 on distilbert",
        "round 1  lora few-labels at 0.005 on bert",
        "round 1  lora few-labels at 0.005 on distilbert",
    ]
    assert lines[1].endswith(" on 60 of 60 rows")
    assert lines[2].endswith(" on 20 of 60 rows")
    assert (answer["judged_by"], answer["folds"], answer["rows"]) == ("folds", 3, 60)
    assert [floor["method"] for floor in answer["floors"]] == ["probe", "probe"]
    assert answer["floor"] == max(answer["floors"], key=lambda floor: floor["score"])
    backbones = {str(backbone_dir("bert")), str(backbone_dir("distilbert"))}
    assert {floor["backbone"] for floor in answer["floors"]} == backbones
    assert {each["backbone"] for each in answer["candidates"]} == backbones
    assert {each["recipe"] for each in answer["candidates"]} == {"default", "few-labels"}
    for each in answer["candidates"]:
        assert each["score"] - each["chosen_on_same_rows"] <= HALF_A_POINT + 1e-9
        assert len(each["scores"]) == each["rows"] / 20


def test_the_table_has_a_line_for_each_candidate_and_its_distance_to_the_chosen(
    on_two_backbones: tuple[dict[str, Any], list[str], Path],
) -> None:
    answer, lines, _ = on_two_backbones
    first = next(row for row, line in enumerate(lines) if line.startswith("  method"))
    assert lines[first].split() == [
        *("method", "rate", "backbone", "accuracy", "rows", "to", "chosen"),
    ]
    for row, (line, each) in enumerate(
        zip(lines[first + 1 : first + 9], answer["candidates"], strict=True)
    ):
        few = [] if each["recipe"] == "default" else [each["recipe"]]
        difference = each["score"] - each["chosen_on_same_rows"]
        rate = "-" if each["learning_rate"] is None else f"{each['learning_rate']:g}"
        assert line.removeprefix("* " if not row else "  ").split() == [
            *(each["method"], *few, rate, Path(each["backbone"]).name, f"{each['score']:.4f}"),
            *(str(each["rows"]), f"{difference:+.4f}"),
        ]
    assert max(map(len, lines[first : first + 9])) <= 80
    assert lines[first + 9] == (
        "to chosen: how far from the chosen one on the rows that both were judged on"
    )


def test_a_score_of_the_rows_that_chose_is_never_given_without_a_word(
    on_two_backbones: tuple[dict[str, Any], list[str], Path],
) -> None:
    answer, lines, _ = on_two_backbones
    assert answer["result"]["tested_on"] == "folds"
    assert answer["score_is_of_rows_that_chose"]
    assert lines[-1] == (
        "note: the rows of this score also chose among 8 candidates: on new rows expect less"
    )


def test_the_preset_repeats_the_run(
    on_two_backbones: tuple[dict[str, Any], list[str], Path],
    rows_file: Path,
    tmp_path: Path,
) -> None:
    answer, _, out = on_two_backbones
    preset = read_preset(str(out / "preset.toml"))
    assert preset["model"]["backbone"] == answer["chosen"]["backbone"]
    rows = ("--train-file", rows_file, "--text", "text", "--label", "label")
    again = ("train", "--preset", out / "preset.toml", *rows, "--out", tmp_path / "again")
    code, _, stderr = invoke(*again)
    assert code == 0, stderr
    first, second = read_run(out / "run"), read_run(tmp_path / "again")
    assert second.experiment == first.experiment
    assert second.result["test"] == first.result["test"]
    assert (out / "preset.toml").read_text().splitlines()[0] == (
        f"# Chosen by folds: accuracy {answer['chosen']['score']:.4f} on 60 of the 60 train rows, "
        "by trainings without them"
    )


@pytest.mark.parametrize("recipe", ["few-labels", "published"])
def test_the_preset_of_another_recipe_holds_all_of_it(
    recipe: str, own_rows: list[str], backbone_dir: Backbones, tmp_path: Path
) -> None:
    code, stdout, stderr = invoke(
        *(*own_rows, "--model", backbone_dir("bert"), "--methods", "lora", "--recipes", recipe),
        *("--seed", 7, "--budget", "0.001s", "--json"),
    )
    assert code == 0, stderr
    chosen = json.loads(stdout)["chosen"]
    run = read_run(tmp_path / "chosen" / "run").experiment
    preset = read_preset(str(tmp_path / "chosen" / "preset.toml"))
    named = resolve([("", preset), ("", {"data": run.settings()["data"]})])
    # What a run writes down of what it found: the precision, the pooling, the scale.
    settled_model = {"pooling": run.model.pooling, "pairs": run.model.pairs}
    assert named.model.model_copy(update=settled_model) == run.model
    settled = {"precision": run.train.precision, "label_scale": run.train.label_scale}
    assert named.train.model_copy(update=settled) == run.train
    assert (named.method_name, named.method) == (chosen["method"], run.method)
    assert (run.train.seed, run.train.epochs) == (7, 2)


def test_rows_with_a_test_of_their_own_are_scored_on_it_alone(
    few: list[str], tmp_path: Path
) -> None:
    test = write_rows(tmp_path / "test.csv", 20, 60)
    code, stdout, stderr = invoke(*few, "--test-file", test, "--dev-size", 0, "--json")
    assert code == 0, stderr
    answer = json.loads(stdout)
    assert (answer["judged_by"], answer["rows"]) == ("folds", 60)
    assert answer["result"]["tested_on"] == "test"
    assert not answer["score_is_of_rows_that_chose"]
    assert "also chose among" not in stderr


def test_the_run_is_scored_by_so_many_folds_as_are_asked_for(few: list[str]) -> None:
    code, stdout, stderr = invoke(*few, "--folds", 2, "--json")
    assert code == 0, stderr
    answer = json.loads(stdout)
    assert len(answer["chosen"]["scores"]) == 3
    assert answer["result"]["folds"]["count"] == 2
    assert answer["score_is_of_rows_that_chose"]


PROBE = "probe, which trains nothing in the backbone"


@pytest.mark.parametrize(
    ("scores", "line"),
    [
        ({"probe": 0.5, "lora": 0.6, "head": 0.5}, f"1 of 2 beat {PROBE}"),
        ({"probe": 0.5, "lora": 0.5}, f"nothing beat {PROBE} (accuracy 0.5000): it is chosen"),
        ({"lora": 0.5}, None),
    ],
)
def test_it_says_what_beat_the_floor(scores: dict[str, float], line: str | None) -> None:
    candidates = [on_dev(name, score, is_complete=True) for name, score in scores.items()]
    assert floor_verdict(candidates) == line


def test_it_says_that_a_floor_is_chosen_though_something_little_known_was_better() -> None:
    floor = on_dev("probe", 0.5, is_complete=True)
    assert floor_verdict([floor, on_dev("lora", 0.504)]) == (
        f"1 of 1 beat {PROBE}, by less than half a point each and on less evidence: it is chosen"
    )


def test_the_floor_is_beaten_on_the_rows_that_both_were_judged_on() -> None:
    floor = by_folds("probe", 0.9, 0.8, 0.7, 0.7, 0.7)
    assert floor_verdict([floor, by_folds("lora", 0.85)]) == (
        f"nothing beat {PROBE} (accuracy 0.7000): it is chosen"
    )


def test_a_budget_that_ends_early_says_what_was_not_tried(few: list[str]) -> None:
    code, stdout, stderr = invoke(*few, "--budget", "0.001s", "--json")
    assert code == 0, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("warning: the budget")]
    assert line == (
        "warning: the budget ended in round 1 of 3; not tried: head at 0.005, lora at 0.005"
    )
    answer = json.loads(stdout)
    assert answer["untried"] == ["head at 0.005", "lora at 0.005"]
    assert not answer["chosen"]["is_complete"] or answer["chosen"]["method"] == "probe"


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        (
            ["--budget", "soon"],
            "--budget 'soon': not a time",
            "write it like 90s, 10m or 1.5h",
        ),
        (["--rates", "fast"], "--rates 'fast': not numbers", "write it like 1e-4,5e-4"),
        (["--rates", "100"], "train.learning_rate = 100.0 is not allowed", None),
        (["--methods", "lorra"], "method 'lorra': no such method", None),
        (
            ["--recipes", "paper"],
            "recipe 'paper': no such recipe",
            "choose one of default, few-labels, published",
        ),
        (
            ["--models", "minilm,bert"],
            "--model and --models contradict each other",
            "give one of them",
        ),
        (
            ["--set", "train.learning_rate=0.1"],
            "train.learning_rate = 0.1: `recommend` decides it",
            "give --rates instead, with all that it may try",
        ),
        (
            ["--set", "method.name=full"],
            "method.name = 'full': `recommend` decides it",
            "give --methods instead, with all that it may try",
        ),
    ],
)
def test_wrong_options_are_refused(
    few: list[str], changed: list[str], message: str, hint: str | None
) -> None:
    refused, advice = error_of(*few, *changed)
    assert refused == message
    assert hint in (None, advice)


def test_backbones_are_several_and_the_searchs_alone(own_rows: list[str]) -> None:
    assert error_of(*own_rows, "--models", "minilm,minilm") == (
        "--models 'minilm,minilm': a backbone is there twice",
        "give each once",
    )
    options = ("--models", "minilm,bert", "--set", "model.backbone=bert")
    assert error_of(*own_rows, *options) == (
        "model.backbone = 'bert': `recommend` decides it",
        "give --models instead, with all that it may try",
    )


def test_several_tasks_have_no_folds_to_choose_by(bert: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv", 160)
    for name in ("one", "two"):
        options = ("--train-file", rows, "--text", "text", "--label", "label", "--task", name)
        drawn = ("--k", 20, "--dev-size", 0, "--out", tmp_path / name)
        code, _, stderr = invoke("prepare", *options, *drawn)
        assert code == 0, stderr
    directories = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    out = tmp_path / "chosen"
    assert error_of("recommend", "--prepared", directories, "--model", bert, "--out", out) == (
        "one, two: no dev rows, and folds are one task's",
        "give --dev-size N",
    )
    assert not out.exists()


def test_one_of_several_backbones_that_cannot_be_read_does_not_end_the_search(
    own_rows: list[str], backbone_dir: Backbones, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    code, stdout, stderr = invoke(
        *(*own_rows, "--models", f"{broken},{backbone_dir('bert')}", "--methods", "head"),
        *("--rates", "1e-3", "--recipes", "default", "--json"),
    )
    assert code == 0, stderr
    answer = json.loads(stdout)
    assert {each["backbone"] for each in answer["failed"]} == {str(broken)}
    assert answer["chosen"]["backbone"] == str(backbone_dir("bert"))
    failed = [line for line in stderr.splitlines() if line.startswith("failed: probe on broken")]
    assert len(failed) == 1
