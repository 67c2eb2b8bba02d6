"""A grid of runs: its cells, what is done once, what goes on, what failed, and both engines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.backbones import Backbones
from support.sweeps import cells_of
from typer.testing import CliRunner

from unipelt_cli.cli import app
from unipelt_cli.data import preparation
from unipelt_cli.runs.names import EXPERIMENT, METRICS, MODEL, RESULT, STATE
from unipelt_cli.runs.run import read_experiment, read_run
from unipelt_cli.sweeps import grid, local_engine, worker
from unipelt_cli.sweeps.cell_reports import CellFailed, CellFinished, CellSpec
from unipelt_cli.sweeps.sweep import FAILURES, CellState, Sweep, best_so_far
from unipelt_cli.system import memory
from unipelt_cli.training import planning
from unipelt_cli.training.planning import RowCache

QUICK = ["--set", "train.epochs=2", "--set", "train.device=cpu", "--precision", "fp32"]


def test_a_process_draws_and_tokenizes_the_same_rows_once(
    backbone_dir: Backbones, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, tokenized = [], []
    draw, tokenize = preparation.prepare_each, planning.encode_rows

    def drawing(settings: Any, files: Any) -> Any:
        drawn.append(settings)
        return draw(settings, files)

    def tokenizing(tuned: Any, columns: Any, limit: int) -> Any:
        tokenized.append(len(columns[0]))
        return tokenize(tuned, columns, limit)

    monkeypatch.setattr(preparation, "prepare_each", drawing)
    monkeypatch.setattr(planning, "encode_rows", tokenizing)
    own = {
        "data": {"folds": 0, "train_file": str(rows_file), "text": "text", "label": "label"},
        "model": {"backbone": str(backbone_dir("bert"))},
        "train": {"epochs": 1, "device": "cpu", "precision": "fp32"},
    }
    shared = RowCache()
    results = []
    for method in ("head", "lora", "bitfit"):
        settings = own | {"method": {"name": method}}
        cell = CellSpec(str(tmp_path / method), settings)
        reports = worker.carry_out([cell], shared)
        results += [report for report in reports if isinstance(report, CellFinished)]
    assert len(results) == 3
    assert len(drawn) == 1
    assert len(tokenized) == 3, "train, dev and test"


@pytest.mark.skipif(sys.platform != "linux", reason="no other system can forget its peak")
def test_a_runs_peak_of_memory_is_its_own() -> None:
    device = torch.device("cpu")
    block = np.ones(40_000_000)  # 320 MB
    high = memory.peak(device)
    del block
    memory.forget_peak()
    assert memory.peak(device) < high - 200_000_000


def test_what_breaks_after_a_cell_has_ended_does_not_end_it_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = [CellSpec(name, {}) for name in "abc"]

    def breaking(given: Any, *_: Any) -> Iterator[Any]:
        assert len(given) == 3
        yield CellFinished("a", {})
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(worker, "_together", breaking)
    reports = list(worker.carry_out(group, RowCache()))
    first, *failed = reports
    assert first == CellFinished("a", {})
    assert [report.directory for report in failed] == ["b", "c"]
    for report in failed:
        assert isinstance(report, CellFailed)
        assert report.error == "ZeroDivisionError: by nothing"
        assert "breaking" in str(report.traceback)


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", "lora"), ("mse", "head")])
def test_the_best_so_far_knows_which_way_is_better(metric: str, expected: str) -> None:
    standings = [
        CellState(
            cells_of({})[0],
            "finished",
            {"task": "x", "k": 8, "method": name, "metric": metric, "dev": {metric: score}},
        )
        for name, score in (("head", 0.2), ("lora", 0.9))
    ]
    assert best_so_far(standings)["x k=8"][0] == expected


# The command


def flags_of(bert: Path, rows_file: Path, out: Path) -> list[str]:
    """Return a sweep of four cells: two methods, two data seeds."""
    return [
        *("sweep", "--train-file", str(rows_file), "--text", "text", "--label", "label"),
        *("--folds", "none", "--model", str(bert), "--methods", "head,lora"),
        *("--data-seeds", "1,2", "--out", str(out), "--workers", "2", *QUICK),
    ]


@pytest.fixture
def flags(bert: Path, rows_file: Path, tmp_path: Path) -> list[str]:
    return flags_of(bert, rows_file, tmp_path / "sweep")


def invoke(arguments: list[str]) -> Any:
    return CliRunner().invoke(app, arguments)


def finished(directory: Path) -> list[Path]:
    return sorted(path.parent for path in directory.glob(f"*/{RESULT}"))


TEN, HALF_TOO_MANY = ["--k", "10"], ["--k", "10,1000"]


@dataclass(frozen=True)
class Swept:
    """A sweep of eight cells of which four cannot be, and what the command said of it."""

    directory: Path
    ended: Any


@pytest.fixture(scope="module")
def swept(bert: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Return a sweep that many tests read; tests that go on with it copy it."""
    directory = tmp_path_factory.mktemp("swept") / "sweep"
    ended = invoke([*flags_of(bert, rows_file, directory), *HALF_TOO_MANY, "--json"])
    return Swept(directory, ended)


@pytest.fixture
def begun(swept: Swept, tmp_path: Path) -> Path:
    """Return a copy of the sweep where `flags` has its own."""
    return Path(shutil.copytree(swept.directory, tmp_path / "sweep"))


def test_a_sweep_trains_each_cell_that_can_be_and_names_the_others(swept: Swept) -> None:
    assert swept.ended.exit_code == 3
    answer = json.loads(swept.ended.stdout)
    assert (answer["cells"], len(answer["runs"]), len(answer["failed"])) == (8, 4, 4)
    assert [run["method"] for run in answer["runs"]] == ["head", "head", "lora", "lora"]
    directories = finished(swept.directory)
    assert [str(path) for path in directories] == sorted(run["run"] for run in answer["runs"])
    assert "[8/8] reviews-k10" in swept.ended.stderr
    error, hint = swept.ended.stderr.splitlines()[-2:]
    assert error == (
        "error: 4 of 8 cells failed, the first with: data.k = 1000: reviews has 60 train rows, "
        "12 of them held for test"
    )
    assert hint.endswith("; then the same command with --retry")


def test_what_is_finished_is_skipped(flags: list[str], begun: Path) -> None:
    before = {path: (path / RESULT).stat().st_mtime_ns for path in finished(begun)}
    again = invoke([*flags, *TEN, "--json"])
    assert again.exit_code == 0, again.stderr
    answer = json.loads(again.stdout)
    assert (answer["cells"], answer["failed"]) == (4, [])
    assert sorted(run["run"] for run in answer["runs"]) == [str(path) for path in before]
    assert "4 of 4 cells are finished already" in again.stderr
    more = invoke([*flags, *TEN, "--data-seeds", "1,2,3"])
    assert more.exit_code == 0
    assert "[6/6] reviews-k10-" in more.stderr
    assert len(finished(begun)) == 6
    assert before == {path: (path / RESULT).stat().st_mtime_ns for path in before}


def test_a_cell_is_the_run_that_train_makes(swept: Swept, tmp_path: Path) -> None:
    directory = next(p for p in finished(swept.directory) if "lora" in p.name and "d2" in p.name)
    alone = invoke(
        ["train", "--preset", str(directory / "experiment.toml"), "--out", str(tmp_path / "alone")]
    )
    assert alone.exit_code == 0, alone.stderr
    results = [json.loads((d / RESULT).read_text()) for d in (directory, tmp_path / "alone")]
    for split in ("dev", "test"):
        assert results[0][split] == pytest.approx(results[1][split], abs=0.05)
    assert invoke(["verify", str(directory)]).exit_code == 0


def test_failed_cells_are_kept_and_tried_again_on_demand(flags: list[str], begun: Path) -> None:
    again = invoke([*flags, *HALF_TOO_MANY])
    assert again.exit_code == 3
    assert "4 of 8 cells are finished already, 4 have failed: --retry tries them again" in (
        again.stderr
    )
    assert "[" not in again.stderr, "nothing is trained"
    retried = invoke([*flags, *HALF_TOO_MANY, "--retry"])
    assert retried.exit_code == 3
    assert retried.stderr.count("failed: data.k = 1000") == 4
    assert len(finished(begun)) == 4


def test_a_failure_is_forgotten_once_its_cell_is_finished(flags: list[str], begun: Path) -> None:
    (begun / FAILURES).unlink()
    cell = finished(begun)[0]
    (cell / MODEL).write_bytes(b"nothing")
    damaged = invoke([*flags, *TEN])
    assert damaged.exit_code == 3
    assert f"{cell / MODEL}: changed since it was written" in damaged.stderr
    for path in cell.iterdir():
        path.unlink()
    cell.rmdir()
    assert invoke([*flags, *TEN, "--retry"]).exit_code == 0
    assert not (begun / FAILURES).exists() or not json.loads((begun / FAILURES).read_text())


def test_a_dry_run_says_what_is_left_and_writes_nothing(
    flags: list[str], swept: Swept, tmp_path: Path
) -> None:
    shown = invoke([*flags, *TEN, "--dry-run", "--json"])
    assert shown.exit_code == 0, shown.stderr
    answer = json.loads(shown.stdout)
    assert [cell["status"] for cell in answer["cells"]] == ["waiting"] * 4
    assert 0 < answer["least_seconds"] <= answer["most_seconds"]
    assert answer["disk_bytes"] > 4 * 40_000
    assert "4 of 4 cells are left" in " ".join(shown.stderr.split())
    assert not (tmp_path / "sweep").exists()
    took = sum(p.stat().st_size for d in finished(swept.directory) for p in d.iterdir())
    assert took / 2 < answer["disk_bytes"] < took * 4


def test_a_dry_run_finds_what_cannot_be_trained(flags: list[str], begun: Path) -> None:
    (begun / FAILURES).unlink()
    some = invoke([*flags, *HALF_TOO_MANY, "--dry-run", "--json"])
    assert some.exit_code == 0
    errors = [cell.get("error") for cell in json.loads(some.stdout)["cells"]]
    assert [error is None for error in errors] == [True, True, True, True, *[False] * 4]
    assert "1000: reviews has 60 train rows" in some.stderr
    shown = invoke([*flags, *TEN, "--dry-run"])
    assert "0 of 4 cells are left" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--engine", "slurm"], "--engine 'slurm': no such engine"),
        (["--cpus", "2"], "--cpus 2.0: not an option of --engine local"),
        (["--engine", "ray"], "--workers 2: not an option of --engine ray"),
        (["--k", "ten"], "--k 'ten': not numbers with commas"),
        (["--methods", "lora,"], "--methods 'lora,': a name is missing"),
        (["no.toml"], "preset 'no.toml': no such file or preset"),
    ],
)
def test_wrong_options_are_refused(flags: list[str], changed: list[str], message: str) -> None:
    refused = invoke([*flags, *changed])
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[0] == f"error: {message}"
    assert len(refused.stderr.splitlines()) == 2


def test_a_run_is_no_place_for_a_sweep(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / EXPERIMENT).write_text("")
    refused = invoke(flags)
    assert refused.exit_code == 2
    assert "a run, and a sweep is a directory of runs" in refused.stderr


def started(flags: list[str]) -> "subprocess.Popen[bytes]":
    """Start the command as a shell would, in a session of its own."""
    command = [sys.executable, "-m", "unipelt_cli", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def workers(parent: int) -> list[int]:
    """Return the processes that train for a sweep."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


LONG = ["--set", "train.epochs=2000", "--set", "train.patience=2000", "--methods", "lora"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_goes_on(
    flags: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    process = started([*flags, *LONG])
    wait_for(lambda: len(list(tmp_path.glob(f"sweep/*/{METRICS}"))) == 2)
    process.send_signal(number)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert talk.decode().splitlines()[-1] == "interrupted: the same command goes on from there"
    assert len(list(tmp_path.glob(f"sweep/*/{STATE}"))) == 2
    cells = [grid.Cell(p.name, read_experiment(p)) for p in (tmp_path / "sweep").glob("*-*")]
    plan = Sweep(tmp_path / "sweep", cells)
    assert [one.status for one in plan.states.values()] == ["interrupted"] * 2


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_behind_and_nothing_lost(
    flags: list[str], tmp_path: Path
) -> None:
    process = started([*flags, *LONG])
    wait_for(lambda: len(list(tmp_path.glob(f"sweep/*/{METRICS}"))) == 2)
    found = workers(process.pid)
    assert len(found) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(lives, found)))
    assert len(list(tmp_path.glob(f"sweep/*/{STATE}"))) == 2


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_cells_go_on(flags: list[str], tmp_path: Path) -> None:
    settings = ["--set", "train.epochs=60", "--set", "train.patience=60", "--methods", "lora"]
    process = started([*flags, *settings])
    wait_for(lambda: len(list(tmp_path.glob(f"sweep/*/{METRICS}"))) == 2)
    os.kill(min(workers(process.pid)), signal.SIGKILL)
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 0, talk
    assert len(finished(tmp_path / "sweep")) == 2


def test_a_group_whose_process_dies_twice_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_engine, "sys", type("S", (), {"executable": "/bin/false"}))
    directory = str(tmp_path / "cell")
    reports = local_engine.run([[CellSpec(directory, {})]], 1, 1, 0, lambda: False)
    (failed,) = [report for report in reports if report is not None]
    assert isinstance(failed, CellFailed)
    assert failed.directory == directory
    assert failed.error == "the process that trained it was ended with 1, 2 times"


# Ray, on a cluster of two nodes


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node of a cluster; on a busy machine Ray gives up on its own processes."""
    try:
        return start()
    except (Exception, SystemExit):
        return start()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start a real cluster of a head and a second node, one CPU each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 1, "include_dashboard": False}
    made = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_a_node_that_dies_costs_no_cell(cluster: Any, flags: list[str], tmp_path: Path) -> None:
    command = [flag for flag in flags if flag not in ("--workers", "2")]
    command += ["--engine", "ray", "--address", cluster.address, "--data-seeds", "1,2,3"]
    settings = ["--set", "train.epochs=30", "--set", "train.patience=30", "--methods", "lora,head"]
    process = started([*command, *settings])
    assert process.stderr is not None
    first = process.stderr.readline()  # it has joined the head, which stays
    node = patiently(lambda: cluster.add_node(num_cpus=1))
    cluster.wait_for_nodes()
    first += process.stderr.readline() + process.stderr.readline()
    assert b"[3/6]" in first
    cluster.remove_node(node, allow_graceful=False)
    _, talk = process.communicate(timeout=240)
    assert process.returncode == 0, talk
    ended = [line for line in (first + talk).splitlines() if line.startswith(b"[")]
    assert len(ended) == len(set(ended)) == 6, "none twice, none lost"
    assert len(finished(tmp_path / "sweep")) == 6
    assert all(read_run(path).result for path in finished(tmp_path / "sweep"))


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_an_error(flags: list[str]) -> None:
    pytest.importorskip("ray")
    command = [flag for flag in flags if flag not in ("--workers", "2")]
    refused = invoke([*command, "--engine", "ray", "--address", "127.0.0.1:1"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: --address 127.0.0.1:1: no cluster answers")


@pytest.mark.parametrize(
    "content",
    [
        "axes = 3",
        "axes = []",
        "[axes]\nk = 3",
        "[axes]\nk = []",
        "[axes]\nk = [[1]]",
        "[axes]\nk = [nan]",
        "[axes]\ntasks = [3]",
        "[axes]\ntasks = ['']",
        "[axes]\ntasks = ['+']",
        "[axes]\nmethods = [{}]",
        "[axes]\nmethods = [{name = 3}]",
        "[axes]\nmethods = [{name = 'lora', train = 3}]",
        "[axes]\nmethods = [{name = 'lora', rank = 3}]",
        "[axes]\nmethods = ['../../x']",
        "[axes]\n'a.b' = [1]",
        "[axes]\n'.' = [1]",
        "[axes]\n'train.seed' = [1]\nseeds = [2, 3]",
        "[axes]\nbackbones = [3]",
        "[axes]\ndata_seeds = [-1]",
        "[axes]\nx" + "x" * 100_000 + " = [1]",
        "data = 3",
        "train = [1]",
    ],
)
def test_a_hostile_grid_is_refused_in_two_short_lines(tmp_path: Path, content: str) -> None:
    (tmp_path / "grid.toml").write_text(content)
    base = ["sweep", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"), "--offline"]
    given = [] if "tasks" in content else ["--tasks", "demo"]
    refused = invoke([*base, *given])
    assert refused.exit_code == 2, refused.output
    lines = refused.stderr.splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) < 2000
    assert not (tmp_path / "out").exists()
