"""Runs compared: what is grouped, what is concluded, what is refused, and what is written."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.command import invoke
from support.finished_runs import SEEDS, answer_of, forge, forge_grid
from support.rows import write_rows
from support.runs import reseal

from unipelt_cli.comparison import documents, gathering, plot, published, tables
from unipelt_cli.comparison.results import Comparison
from unipelt_cli.comparison.summary import summarise_directories
from unipelt_cli.files import sealed
from unipelt_cli.runs.names import PREDICTIONS, PROBE, RESULT
from unipelt_cli.tasks import TASKS


def test_a_group_is_its_seeds_mean_spread_and_intervals(tmp_path: Path) -> None:
    for seed, score in zip(SEEDS, (0.80, 0.81, 0.82, 0.83, 0.84), strict=True):
        forge(tmp_path / f"deep/er/{seed}", "lora", score, seed=seed, seconds=seed)
    answer = answer_of(tmp_path)
    (group,) = answer["groups"]
    assert {key: group[key] for key in ("task", "k", "backbone", "method", "label")} == {
        **{"task": "sst2", "k": 100, "backbone": "bert-base-uncased"},
        **{"method": "lora", "label": "lora"},
    }
    assert [own["score"] for own in group["seeds"]] == [0.80, 0.81, 0.82, 0.83, 0.84]
    assert group["mean"] == pytest.approx(0.82)
    assert group["standard_deviation"] == pytest.approx(0.0158114)
    assert group["interval"] == pytest.approx([0.82 - 0.0196324, 0.82 + 0.0196324], abs=1e-6)
    low, high = group["interval_by_rows"]
    assert 0.77 < low < 0.82 < high < 0.87
    assert (group["median_seconds"], group["peak_memory_bytes"]) == (333, 2**30)
    assert (group["collapsed"], group["mean_not_collapsed"]) == (0, pytest.approx(0.82))
    assert answer["runs"] == {"finished": 5, "repeated": [], "unusable": []}


def test_the_json_has_this_shape(tmp_path: Path) -> None:
    scores = {"adapter": 0.7, "lora": 0.72, "prefix": 0.6, "unipelt-apl": 0.75}
    answer = answer_of(forge_grid(tmp_path, scores, ("sst2", "mrpc")), "--against", "paper")
    assert answer.keys() == {
        *("runs", "margin", "groups", "tables", "comparisons", "against", "notes"),
    }
    assert answer["groups"][0].keys() == {
        *("task", "k", "backbone", "method", "label", "settings", "submodules", "metric", "seeds"),
        *("mean", "standard_deviation", "interval", "interval_by_rows", "collapsed"),
        *("mean_not_collapsed", "trainable_parameters", "stored_parameters", "head_parameters"),
        *("median_seconds", "peak_memory_bytes"),
    }
    (table,) = answer["tables"]
    assert table.keys() == {
        *("backbone", "k", "tasks", "averaged_tasks", "methods", "bounds", "floor"),
    }
    assert table["floor"] is None, "runs of before noted none"
    assert table["methods"][0].keys() == {"label", "means", "average", "average_rank"}
    assert len(answer["comparisons"]) == 6
    assert answer["comparisons"][0].keys() == {
        *("backbone", "ks", "methods", "tasks", "seeds", "pairs", "difference", "interval", "p"),
        *("p_holm", "p_equivalence", "wins", "ties", "losses", "better", "verdict"),
        *("seeds_needed", "said"),
    }
    assert answer["against"].keys() == {
        *("name", "backbone", "cells", "averages", "costs", "notes"),
    }


def test_collapsed_runs_are_counted_beside_every_mean(tmp_path: Path) -> None:
    for seed in SEEDS:
        forge(tmp_path / str(seed), "prefix", 0.8, seed=seed, collapsed=seed == 222)
    code, stdout, _ = invoke("compare", tmp_path)
    assert code == 0
    assert "1c" in stdout
    (group,) = answer_of(tmp_path)["groups"]
    assert (group["collapsed"], group["mean_not_collapsed"]) == (1, pytest.approx(0.8))
    assert group["mean"] < 0.79


def test_other_settings_never_share_a_mean_and_are_named(tmp_path: Path) -> None:
    for seed in SEEDS[:2]:
        forge(tmp_path / f"a{seed}", "lora", 0.8, seed=seed)
        forge(tmp_path / f"b{seed}", "lora", 0.7, seed=seed, train={"learning_rate": 0.001})
        forge(tmp_path / f"c{seed}", "adapter", 0.7, seed=seed, train={"device": "cuda"})
        forge(tmp_path / f"d{seed}", "adapter", 0.7, seed=seed + 1, data={"source": "/x/glue"})
    found = {own["label"]: own for own in answer_of(tmp_path)["groups"]}
    assert found.keys() == {"adapter", "lora learning_rate=0.0005", "lora learning_rate=0.001"}
    assert found["lora learning_rate=0.001"]["settings"] == {"train.learning_rate": 0.001}
    assert len(found["adapter"]["seeds"]) == 4


def test_the_scale_of_labels_tells_regressions_apart_alone(tmp_path: Path) -> None:
    for seed, scale in ((111, "raw"), (222, "standardised")):
        train = {"label_scale": scale}
        forge(tmp_path / f"sst2-{seed}", "lora", 0.8, seed=seed, train=train)
        forge(tmp_path / scale, "lora", 0.8, "stsb", train=train, stores_predictions=False)
    groups = answer_of(tmp_path)["groups"]
    assert [(own["task"], own["label"], len(own["seeds"])) for own in groups] == [
        ("sst2", "lora", 2),
        ("stsb", "lora label_scale=raw", 1),
        ("stsb", "lora label_scale=standardised", 1),
    ]


def test_one_experiment_counts_once_and_unusable_runs_are_said(tmp_path: Path) -> None:
    forge(tmp_path / "a", "lora", 0.8)
    forge(tmp_path / "copy", "lora", 0.8, stores_predictions=False)
    forge(tmp_path / "z", "lora", 0.7)
    (forge(tmp_path / "unfinished", "lora", 0.8, seed=222) / RESULT).unlink()
    (forge(tmp_path / "damaged", "lora", 0.8, seed=333) / PROBE).write_bytes(b"x")
    forged = forge(tmp_path / "forged", "lora", 0.8, seed=444)
    tensors, _ = sealed.open_tensors(forged / PREDICTIONS)
    tensors["predictions.0"][:50] = 1 - tensors["references.0"][:50]
    sealed.write_tensors(forged / PREDICTIONS, tensors, {})
    reseal(forged)
    code, _, stderr = invoke("compare", tmp_path, tmp_path / "a")
    assert code == 0
    lines = [line for line in stderr.splitlines() if line.startswith("note: ")]
    assert lines == [
        f"note: 3 runs left out, such as {tmp_path / 'damaged'}: damaged",
        f"note: 2 of the same experiment as another, such as {tmp_path / 'copy'}",
        f"note: {tmp_path / 'a'}: counted once of 3 runs of its experiment, "
        "which scored 0.7000 to 0.8000",
    ]
    why = {Path(own["run"]).name: own["why"] for own in answer_of(tmp_path)["runs"]["unusable"]}
    assert why == {"damaged": "damaged", "forged": "damaged", "unfinished": "no epoch done"}


def test_tasks_called_the_same_with_other_rows_are_told_apart(tmp_path: Path) -> None:
    forge(tmp_path / "a", "lora", 0.8)
    forge(tmp_path / "b", "lora", 0.7, digest="other rows")
    forge(tmp_path / "c", "adapter", 0.7)
    assert {own["task"] for own in answer_of(tmp_path)["groups"]} == {"sst2 #1", "sst2 #2"}
    assert {own["verdict"] for own in answer_of(tmp_path)["comparisons"]} == {"refused"}


def test_other_weights_under_one_name_are_two_backbones(tmp_path: Path) -> None:
    forge(tmp_path / "a", "lora", 0.8, backbone="/a/bert")
    forge(tmp_path / "b", "lora", 0.8, backbone="/b/bert", seed=222)
    names = [own["backbone"] for own in answer_of(tmp_path)["groups"]]
    assert names == ["bert (/a/ber)", "bert (/b/ber)"]


def test_runs_without_predictions_have_no_interval_over_rows(tmp_path: Path) -> None:
    forge(tmp_path / "a", "lora", 0.8, stores_predictions=False)
    forge(tmp_path / "b", "lora", 0.8, seed=222)
    (group,) = answer_of(tmp_path)["groups"]
    assert group["interval_by_rows"] is None
    assert group["interval"] is not None


def verdict_of(root: Path, *arguments: object) -> dict[str, Any]:
    (found,) = answer_of(root, *arguments)["comparisons"]
    return dict(found)


def test_one_seed_has_no_winner(tmp_path: Path) -> None:
    forge(tmp_path / "a", "lora", 0.9)
    forge(tmp_path / "b", "adapter", 0.5)
    found = verdict_of(tmp_path)
    assert (found["verdict"], found["better"], found["p"]) == ("refused", None, None)
    assert found["said"] == "no winner from one seed: at least 6 would be needed"
    (group, _) = answer_of(tmp_path)["groups"]
    assert (group["interval"], group["standard_deviation"]) == (None, None)
    forge(tmp_path / "c", "lora", 0.9, task="rte")
    forge(tmp_path / "d", "adapter", 0.5, task="rte", seed=222)
    assert verdict_of(tmp_path)["said"] == "no winner from one seed: at least 3 would be needed"


def test_five_seeds_of_one_task_cannot_show_a_winner(tmp_path: Path) -> None:
    found = verdict_of(forge_grid(tmp_path, {"adapter": 0.5, "lora": 0.9}))
    assert (found["p"], found["verdict"], found["better"]) == (2 / 2**5, "undecided", None)
    assert found["said"] == "undecided: about 6 seeds would be needed"


def test_a_clear_winner_over_tasks_is_ahead(tmp_path: Path) -> None:
    found = verdict_of(forge_grid(tmp_path, {"adapter": 0.5, "lora": 0.6}, ("sst2", "rte")))
    assert (found["verdict"], found["better"]) == ("ahead", "lora")
    assert found["said"] == "lora is ahead"
    assert (found["wins"], found["ties"], found["losses"]) == (0, 0, 2)
    assert found["p"] == found["p_holm"] == 2 / 2**10
    assert found["interval"][0] < found["difference"] < found["interval"][1] < 0
    assert (found["pairs"], found["seeds"], found["tasks"]) == (10, 5, ["sst2", "rte"])


def test_equal_methods_are_equivalent_within_the_margin_alone(tmp_path: Path) -> None:
    forge_grid(tmp_path, {"adapter": 0.7, "lora": 0.7}, ("sst2", "rte"))
    found = verdict_of(tmp_path, "--margin", "0.05")
    assert (found["verdict"], found["said"]) == ("equivalent", "equivalent within 0.05")
    found = verdict_of(tmp_path, "--margin", "0.001")
    assert found["verdict"] == "undecided"
    assert found["seeds_needed"] is None or found["seeds_needed"] > 5


def test_pairs_are_corrected_for_how_many_there_are(tmp_path: Path) -> None:
    scores = {"adapter": 0.5, "lora": 0.6, "prefix": 0.7, "head": 0.8}
    found = answer_of(forge_grid(tmp_path, scores))["comparisons"]
    assert {own["p"] for own in found} == {2 / 2**5}
    assert {own["p_holm"] for own in found} == {6 * 2 / 2**5}
    assert {own["seeds_needed"] for own in found} == {8}  # 2 / 2^8 < 0.05 / 6


def test_several_k_are_compared_one_by_one_and_together(tmp_path: Path) -> None:
    for k in (100, 500, None):
        forge_grid(tmp_path / str(k), {"adapter": 0.5, "lora": 0.6}, k=k)
    found = answer_of(tmp_path)["comparisons"]
    assert [own["ks"] for own in found] == [[100], [500], [None], [100, 500, None]]
    assert [own["pairs"] for own in found] == [5, 5, 5, 5]
    assert found[-1]["losses"] == 3


def test_a_union_is_set_against_the_best_of_its_parts(tmp_path: Path) -> None:
    scores = {"adapter": 0.6, "prefix": 0.7, "full": 0.9, "unipelt-ap": 0.65}
    forge_grid(tmp_path, scores)
    forge_grid(
        tmp_path, {"adapter": 0.8, "prefix": 0.5, "unipelt-ap": 0.85, "unipelt-apl": 0.7}, ("rte",)
    )
    answer = answer_of(tmp_path)
    means = {(own["task"], own["method"]): own["mean"] for own in answer["groups"]}
    two, three = answer["tables"][0]["bounds"]
    best = [means["sst2", "prefix"], means["rte", "adapter"]]
    assert (two["label"], two["missing"], two["tasks"]) == ("unipelt-ap", [], ["sst2", "rte"])
    assert two["bound"] == pytest.approx(sum(best) / 2)
    assert two["difference"] == pytest.approx(
        (means["sst2", "unipelt-ap"] + means["rte", "unipelt-ap"] - sum(best)) / 2
    )
    assert (three["label"], three["missing"], three["tasks"]) == ("unipelt-apl", ["lora"], ["rte"])


def test_averages_need_every_task(tmp_path: Path) -> None:
    forge_grid(tmp_path, {"adapter": 0.6, "lora": 0.7}, ("sst2", "rte"))
    forge_grid(tmp_path, {"head": 0.9})
    (table,) = answer_of(tmp_path)["tables"]
    assert [own["label"] for own in table["methods"]] == ["adapter", "head", "lora"]
    assert [own["average_rank"] for own in table["methods"]] == [2.0, None, 1.0]
    assert table["methods"][1]["average"] is None
    assert table["methods"][1]["means"]["rte"] is None


def test_the_papers_rows_average_to_what_it_prints() -> None:
    table = published.read_published("paper")
    assert len(table.rows) == 3 * 7 + 7
    for row in table.rows:
        assert sum(row.means) / len(row.means) == pytest.approx(row.average, abs=0.0101), row
        assert (row.deviations is None) == (row.k == "all")
    assert next(costs.method for costs in table.costs) == table.costs_relative_to


@pytest.mark.parametrize(
    ("k", "two", "three"), [(100, 58.86, 60.60), (500, 69.69, 70.02), (1000, 72.58, 73.19)]
)
def test_the_papers_upper_bounds_follow_from_its_scores(k: int, two: float, three: float) -> None:
    table = published.read_published("paper")
    rows = {row.method: row.means for row in table.rows if row.k == k}
    for names, expected in ((("adapter", "prefix"), two), (("adapter", "prefix", "lora"), three)):
        best = [max(scores) for scores in zip(*(rows[name] for name in names), strict=True)]
        assert sum(best) / len(best) == pytest.approx(expected, abs=0.0101)


def test_against_the_paper_cell_by_cell(tmp_path: Path) -> None:
    table = published.read_published("paper")
    for task in table.tasks:
        if not TASKS[task].is_regression:
            forge(tmp_path / task, "lora", 0.75, task)
    answer = answer_of(tmp_path, "--against", "paper")["against"]
    cells = {cell["task"]: cell for cell in answer["cells"]}
    assert cells["sst2"]["theirs"] == pytest.approx(0.8156)
    assert cells["sst2"]["their_deviation"] == pytest.approx(0.0094)
    assert cells["sst2"]["difference"] == pytest.approx(0.75 - 0.8156)
    assert answer["averages"] == []  # one of eight tasks is not there
    assert answer["costs"][0]["theirs_stored"] == 295_000
    assert answer["notes"] == [
        "Mao et al. 2022 averaged over five data seeds; the runs here are of other numbers"
    ]
    forge(tmp_path / "other", "lora", 0.75, backbone="minilm")
    _, stdout, stderr = invoke("compare", tmp_path, "--against", "paper")
    assert (
        "note: Mao et al. 2022 used bert-base-uncased: the differences on minilm are between "
        "backbones as well" in stderr
    )
    assert "0.8156 ±0.0094" in stdout


def test_times_are_shares_of_full_fine_tuning(tmp_path: Path) -> None:
    forge(tmp_path / "a", "full", 0.8, seconds=20)
    forge(tmp_path / "b", "lora", 0.8, seconds=5)
    found = {
        own["label"]: own for own in answer_of(tmp_path, "--against", "paper")["against"]["costs"]
    }
    assert found["lora"]["ours_train_time"] == 0.25
    assert found["lora"]["theirs_train_time"] == 0.53
    assert found["full"]["ours_train_time"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["nowhere"],
            "nowhere: no such directory",
            "give directories that hold runs",
        ),
        (
            ["empty"],
            "empty: no finished run there",
            "give directories that `train` wrote, or that hold such",
        ),
        (
            ["begun"],
            "begun: no finished run there (1 unfinished or damaged)",
            "give directories that `train` wrote, or that hold such",
        ),
        (
            ["whole", "--write", "x.xlsx"],
            "--write 'x.xlsx': no such format",
            "give a path ending in .md, .tex, .csv, .json",
        ),
        (
            ["whole", "--plot", "x.gif"],
            "--plot 'x.gif': no such format",
            "give a path ending in .png, .svg, .pdf",
        ),
        (
            ["whole", "--against", "papre"],
            "--against 'papre': no such published scores",
            "did you mean paper? otherwise choose one of paper",
        ),
        (
            ["whole", "--write", "no/x.md"],
            "no/x.md: cannot be written (No such file or directory)",
            None,
        ),
    ],
)
def test_what_cannot_be_is_said_in_two_lines(
    arguments: list[str],
    message: str,
    hint: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    (forge(Path("begun"), "lora", 0.8) / RESULT).unlink()
    forge(Path("whole"), "lora", 0.8)
    code, stdout, stderr = invoke("compare", *arguments)
    *_, said, told = stderr.splitlines()
    assert (code, stdout, said) == (2, "", f"error: {message}")
    assert hint is None or told == f"hint: {hint}"
    assert {path.name for path in Path().iterdir()} == {"empty", "begun", "whole"}


def test_tables_fit_80_columns_in_blocks(tmp_path: Path) -> None:
    tasks = ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte")
    scores = {"adapter": 0.6, "unipelt-apl": 0.7}
    forge_grid(tmp_path, scores, tasks)
    for seed in SEEDS:
        options = {"train": {"learning_rate": 0.003}, "options": {"rank": 16}}
        forge(tmp_path / f"x{seed}", "adapter", 0.5, seed=seed, train={"learning_rate": 0.003})
        forge(tmp_path / f"y{seed}", "unipelt-apl", 0.5, seed=seed, **options)
    code, stdout, _ = invoke("compare", tmp_path, "--against", "paper")
    assert code == 0
    assert max(len(line) for line in stdout.splitlines() if "note: " not in line) <= 80
    assert stdout.count("\nmethod") >= 4
    for task in tasks:
        assert f"{task} {TASKS[task].metric}" in stdout


def test_documents_hold_the_tables(tmp_path: Path) -> None:
    forge_grid(tmp_path / "runs", {"adapter": 0.6, "unipelt-apl": 0.7}, ("sst2", "rte"))
    paths = [tmp_path / f"table{ending}" for ending in documents.FORMATS]
    writing = [word for path in paths for word in ("--write", path)]
    code, stdout, stderr = invoke("compare", tmp_path / "runs", *writing, "--json")
    assert code == 0, stderr
    texts = {path.suffix: path.read_text(encoding="utf-8") for path in paths}
    assert texts[".json"] == stdout
    mean = json.loads(stdout)["groups"][0]["mean"]
    assert f"| adapter | {mean:.4f} ±" in texts[".md"]
    assert r"\toprule" in texts[".tex"]
    assert rf"adapter & {mean:.4f} $\pm$" in texts[".tex"]
    rows = list(csv.DictReader(io.StringIO(texts[".csv"])))
    assert len(rows) == 4
    assert float(rows[0]["mean"]) == mean
    assert {path.name for path in tmp_path.iterdir()} == {"runs", *(path.name for path in paths)}


def test_documents_are_safe_whatever_a_task_is_called(tmp_path: Path) -> None:
    forge(tmp_path / "a", "lora", 0.8)
    comparison = summarise_directories([tmp_path])
    names = ["=cmd|' /C calc'!A0", "+1", "-1", "@x", "\t=1", "\r=1", "a_b & 50% #1 {x} \\ ~^$"]
    group, table = comparison.groups[0], comparison.tables[0]
    groups = tuple(replace(group, task=name, label="<b>|x|") for name in names)
    read = list(
        csv.DictReader(io.StringIO(documents.csv_table(replace(comparison, groups=groups))))
    )
    kept = [*(f"'{name}" for name in names[:4]), r"'\t=1", r"'\r=1", names[-1]]
    assert [row["task"] for row in read] == kept
    assert float(read[0]["mean"]) == group.mean

    def labelled(label: str) -> Comparison:
        methods = (replace(table.methods[0], label=label),)
        return replace(
            comparison,
            groups=(replace(group, label=label),),
            tables=(replace(table, methods=methods),),
        )

    escaped = r"a\_b \& 50\% \#1 \{x\} \textbackslash{} \textasciitilde{}\textasciicircum{}\$"
    assert escaped in documents.latex(labelled(names[-1]))
    hostile = labelled("<b>|x|\x1b")
    assert r"| \<b\>\|x\|\\x1b |" in documents.markdown(hostile)
    plot.plot_comparison(hostile, tmp_path / "picture.svg")


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_the_picture_is_drawn(tmp_path: Path, ending: str) -> None:
    forge_grid(tmp_path / "runs", {"adapter": 0.6, "head": 0.5}, ("sst2", "rte"))
    forge(tmp_path / "runs" / "one", "lora", 0.8, k=None)
    path = tmp_path / f"picture{ending}"
    code, _, stderr = invoke("compare", tmp_path / "runs", "--plot", path)
    assert code == 0, stderr
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert path.read_bytes().startswith(starts[ending])
    assert f"picture: {path}" in stderr


def test_trained_runs_are_compared(backbone_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """As the README says: train with seeds, compare; own rows are drawn by the data seed."""
    rows = write_rows(tmp_path / "reviews.csv")
    for method in ("lora", "unipelt-ap"):
        code, _, stderr = invoke(
            *(
                "train",
                "--train-file",
                rows,
                "--text",
                "text",
                "--label",
                "label",
                "--folds",
                "none",
                "--k",
                24,
            ),
            *("--method", method, "--model", backbone_dir("bert"), "--data-seeds", "111,222"),
            *("--set", "train.epochs=2", "--device", "cpu", "--precision", "fp32"),
            *("--out", tmp_path / "runs"),
        )
        assert code == 0, stderr
    answer = answer_of(tmp_path / "runs")
    assert [(own["task"], own["label"]) for own in answer["groups"]] == [
        ("reviews", "lora"),
        ("reviews", "unipelt-ap"),
    ]
    for group in answer["groups"]:
        low, high = group["interval_by_rows"]
        assert 0 <= low <= group["mean"] <= high <= 1
    assert [own["seeds"] for own in answer["comparisons"]] == [2]
    said = "seconds and memory of 4 runs are those of several that shared their passes"
    assert answer["notes"] == [said]


def test_joint_runs_are_one_task_with_an_interval(
    backbone_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, start in (("a", 0), ("b", 100)):
        rows = write_rows(tmp_path / f"{name}.csv", start=start)
        code, _, stderr = invoke(
            *(
                "prepare",
                "--train-file",
                rows,
                "--text",
                "text",
                "--label",
                "label",
                "--folds",
                "none",
            ),
            *("--k", 24, "--out", tmp_path / name),
        )
        assert code == 0, stderr
    code, _, stderr = invoke(
        *("train", "--prepared", f"{tmp_path / 'a'},{tmp_path / 'b'}", "--method", "lora"),
        *("--model", backbone_dir("bert"), "--set", "train.epochs=1", "--device", "cpu"),
        *("--out", tmp_path / "run"),
    )
    assert code == 0, stderr
    (group,) = answer_of(tmp_path / "run")["groups"]
    assert (group["task"], group["metric"]) == ("a+b", "mean")
    low, high = group["interval_by_rows"]
    assert low <= group["mean"] <= high


def test_what_a_lower_score_is_better_in_is_ranked_so(tmp_path: Path) -> None:
    forge(tmp_path / "a", "lora", 0.8)
    (group,) = gathering.gather([tmp_path]).groups
    assert group.sign == 1
    member = group.members[0]
    scores = {"metric": "mse", "dev": {"mse": 0.5}, "test": {"mse": 0.5}}
    run = replace(member.run, result={**member.run.result, **scores})
    assert replace(group, members=(replace(member, run=run),)).sign == -1
    assert tables.score(None) == "-"
