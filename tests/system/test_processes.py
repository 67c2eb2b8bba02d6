"""Several processes on one run: what one computes, written once, and no process left waiting."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ranks
from support.command import FAST
from support.pairs import pair_options, sentence_encoder, write_pairs
from support.rows import write_rows
from typer.testing import CliRunner

from unipelt_cli.cli import app
from unipelt_cli.errors import ConfigError
from unipelt_cli.files.sealed import open_tensors
from unipelt_cli.models.evaluation import compute_logits
from unipelt_cli.runs.names import (
    ENVIRONMENT,
    EXPERIMENT,
    METRICS,
    MODEL,
    PROBE,
    RECORDED,
    RESULT,
    STATE,
)
from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.runs.run import read_run
from unipelt_cli.system import processes as processes_module
from unipelt_cli.system.processes import ALONE
from unipelt_cli.training.events import Epoch

TESTS = Path(__file__).parents[1]
SECONDS = 60.0  # after which a process hangs
EPOCHS = 30


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Launched:
    """Two processes of one run, by rank."""

    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def end(self) -> list[tuple[int, str, str]]:
        """Wait for them; return each one's exit code, stdout and stderr."""
        until, ended = time.monotonic() + SECONDS, []
        for process in self.processes:
            try:
                out, err = process.communicate(timeout=max(1.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail("a process hangs")
            ended.append((process.returncode, out, err))
        return ended


@contextmanager
def launch(arguments: list[str], root: Path) -> Iterator[Launched]:
    """Start two processes as a launcher would, without its own words and exit code."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launched = Launched()
    try:
        for rank in range(2):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            launched.processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=root,
                    env={**os.environ, **group, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield launched
    finally:
        for process in launched.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def root(backbone_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("processes")
    shutil.copytree(backbone_dir("bert"), directory / "bert")
    write_rows(directory / "rows.csv", 120)
    return directory


TRAIN = [
    *(
        "train",
        "--train-file",
        "rows.csv",
        "--text",
        "text",
        "--label",
        "label",
        "--folds",
        "none",
        "--k",
        "42",
    ),
    *("--dev-size", "30", "--model", "bert", "--precision", "fp32", "--device", "cpu", "--json"),
    *("--set", "train.batch_size=8", "--set", "train.learning_rate=0.01", "--offline"),
    *("--set", f"train.epochs={EPOCHS}", "--set", f"train.patience={EPOCHS}"),
]
COMMAND = ["-m", "unipelt_cli", *TRAIN]


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """Return a run that accelerate's own launcher started on two processes."""
    launcher = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", str(free_port())),
    ]
    ended = subprocess.run(
        [*launcher, "-m", "unipelt_cli", *TRAIN, "--out", "whole"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == json.loads((root / "whole" / RESULT).read_text())
    assert ended.stderr.count("run: whole") == 1
    return root / "whole"


def model_of(run: Path) -> dict[str, torch.Tensor]:
    return open_tensors(run / MODEL)[0]


def epochs_of(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_metrics(run) if event["kind"] == "epoch"]


@pytest.mark.slow
def test_two_processes_write_one_whole_run(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {*RECORDED, RESULT}
    assert [event["epoch"] for event in epochs_of(whole)] == list(range(1, EPOCHS + 1))
    result = read_run(whole).result
    assert (result["processes"], result["micro_batch_size"]) == (2, 4)
    assert json.loads((whole / ENVIRONMENT).read_text())["processes"] == 2
    read_run(whole).build()


@pytest.mark.slow
def test_one_process_reaches_the_same_scores(
    root: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    ended = CliRunner().invoke(app, [*TRAIN, "--out", "one"])
    assert ended.exit_code == 0, ended.stderr
    one, two = (read_run(root / name).result for name in ("one", "whole"))
    assert one["processes"] == 1
    assert one["epochs"] == two["epochs"]
    for split, rows in (("dev", 30), ("test", 24)):  # the dropout is another
        assert one[split]["accuracy"] == pytest.approx(two[split]["accuracy"], abs=6 / rows)
    losses = [[event["train_loss"] for event in epochs_of(root / n)] for n in ("one", "whole")]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.1)


@pytest.mark.slow
def test_two_processes_train_on_pairs_read_apart_as_one_does(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence_encoder(root / "encoder", root / "bert")
    rows = pair_options(write_pairs(root / "pairs.csv", 60))
    command = ["train", *rows, "--model", "encoder", *FAST]
    # Parts draw other dropout, which moves little at a rate that gates have too.
    command += ["--set", "train.learning_rate=1e-5", "--set", "method.gate_rate=1.0"]
    with launch(["-m", "unipelt_cli", *command, "--out", "pairs-two"], root) as launched:
        ended = launched.end()
    assert [code for code, _, _ in ended] == [0, 0], ended
    one = subprocess.run(
        [sys.executable, "-m", "unipelt_cli", *command, "--out", "pairs-one"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert one.returncode == 0, one.stderr
    runs = [read_run(root / f"pairs-{name}") for name in ("one", "two")]
    assert [run.experiment.model.pairs for run in runs] == ["apart", "apart"]
    assert [run.result["processes"] for run in runs] == [1, 2]
    gates = [epochs_of(run.directory)[0]["gates"] for run in runs]
    for own, other in zip(*gates, strict=True):
        assert own == pytest.approx(other, abs=1e-3)
    monkeypatch.chdir(root)
    scored = CliRunner().invoke(app, ["eval", "pairs-two", "--json"])
    assert json.loads(scored.stdout)["scores"] == runs[1].result["test"]


@pytest.mark.slow
def test_a_directory_that_exists_ends_both_and_is_said_once(root: Path, whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with launch([*COMMAND, "--out", "whole"], root) as launched:
        main, other = launched.end()
    hint = "hint: go on with --resume, replace it with --overwrite, or give another --out"
    assert main == (2, "", f"error: whole: exists already\n{hint}\n")
    assert other == (2, "", "")
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


@pytest.fixture(scope="module")
def stopped(root: Path) -> Path:
    """Return a run of two processes of which the second was asked to end."""
    out = root / "stopped"
    with launch([*COMMAND, "--out", out.name], root) as launched:
        until = time.monotonic() + SECONDS
        while not (out / METRICS).is_file() or len(epochs_of(out)) < 3:
            assert time.monotonic() < until
            time.sleep(0.02)
        launched.processes[1].send_signal(signal.SIGTERM)
        main, other = launched.end()
    assert (main[0], main[1]) == (130, "")
    assert main[2].endswith("interrupted: go on with --resume --out stopped\n")
    assert other == (130, "", "")
    return out


@pytest.mark.slow
def test_a_request_to_one_process_stops_both_and_resume_goes_on(
    root: Path, whole: Path, stopped: Path
) -> None:
    assert len(epochs_of(stopped)) < EPOCHS
    last = read_metrics(stopped)[-1]
    assert last["kind"] == "interrupted"
    kept = {path.name for path in stopped.iterdir()}
    assert kept == {EXPERIMENT, ENVIRONMENT, METRICS, STATE}
    shutil.copytree(stopped, root / "resumed")
    with launch([*COMMAND, "--out", "resumed", "--resume"], root) as launched:
        main, other = launched.end()
    assert main[0] == 0, main[2]
    assert other == (0, "", "")
    check_like(root / "resumed", whole)
    for name in (MODEL, PROBE, EXPERIMENT):
        assert (root / "resumed" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_one_process_goes_on_with_a_run_of_two(
    root: Path, whole: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stopped, root / "alone")
    monkeypatch.chdir(root)
    ended = CliRunner().invoke(app, [*TRAIN, "--out", "alone", "--resume"])
    assert ended.exit_code == 0, ended.stderr
    assert read_run(root / "alone").result["processes"] == 1
    check_like(root / "alone", whole)


def check_like(run: Path, whole: Path) -> None:
    """Check that a run ended like another, within the rounding of sums."""
    found, expected = epochs_of(run), epochs_of(whole)
    for one, other in zip(found, expected, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
    assert read_run(run).result["best_epoch"] == read_run(whole).result["best_epoch"]
    for name, tensor in model_of(whole).items():
        torch.testing.assert_close(model_of(run)[name], tensor, atol=1e-5, rtol=0.0)


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_other_waiting(root: Path) -> None:
    out = root / "killed"
    with launch([*COMMAND, "--set", "train.epochs=999", "--out", out.name], root) as launched:
        until = time.monotonic() + SECONDS
        while not (out / METRICS).is_file():
            assert time.monotonic() < until
            time.sleep(0.02)
        launched.processes[1].kill()
        main, other = launched.end()
    assert other[0] == -signal.SIGKILL
    assert main[0] == 2
    said = main[2].splitlines()[-2:]
    assert said[0].startswith("error: another process of this run has ended")
    assert said[1] == "hint: see what it said; --resume goes on from the state that was saved last"
    assert "Traceback" not in main[2]


@dataclass
class Ranks:
    """What two processes of `ranks.py` wrote down."""

    backbone: str
    said: list[dict[str, Any]]
    tensors: list[dict[str, torch.Tensor]]
    out: Path


@pytest.fixture(scope="module")
def two(root: Path) -> Ranks:
    out = root / "ranks"
    out.mkdir()
    with launch(
        [str(TESTS / "support" / "ranks.py"), "bert", "rows.csv", str(out)], root
    ) as launched:
        for code, _, err in launched.end():
            assert code == 0, err
    said = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
    tensors = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return Ranks(str(root / "bert"), said, tensors, out)


@pytest.mark.slow
@pytest.mark.parametrize("method", ranks.LOOPS)
def test_two_processes_compute_what_one_does_in_parts(two: Ranks, method: str) -> None:
    loop = ranks.LOOPS[method](two.backbone)
    loop.progress.micro_batch_size = ranks.BATCH // 2
    losses = [event.train_loss for event in loop.events() if isinstance(event, Epoch)]
    assert two.said[0][method] == pytest.approx(losses, rel=1e-5)
    expected = ranks.tensors_of(loop)
    expected["logits"] = torch.from_numpy(compute_logits(loop.tuned, loop.dev[0]))
    for name, tensor in expected.items():
        found = two.tensors[0][f"{method} {name}"]
        torch.testing.assert_close(found, tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.slow
def test_processes_stay_in_step_to_the_bit(two: Ranks) -> None:
    """Also where a step draws random numbers, and where one has no rows of the last batch."""
    assert two.tensors[0].keys() == two.tensors[1].keys()
    for name, tensor in two.tensors[0].items():
        assert torch.equal(tensor, two.tensors[1][name]), name
    assert two.said[0]["child-tuning-f"] == two.said[1]["child-tuning-f"]


@pytest.mark.slow
def test_processes_tell_each_other_what_happened(two: Ranks) -> None:
    for rank, said in enumerate(two.said):
        assert said["heard"] == {
            "main": {"rank": 0},
            "nothing": None,
            "main fails": "CheckError: rank 0 failed; do nothing",
            "each": rank,
            "each fails": "CheckError: rank 1 failed; do nothing",
            "any": [False, True],
            "gather": [0, 1],
            "sum": [3.0, 4.0],
            "share": [[True, True], 5],
        }


@pytest.mark.slow
def test_memory_that_one_process_lacks_halves_the_parts_of_all(two: Ranks) -> None:
    for said in two.said:
        assert said["halved"] == [1]
        assert said["not one row"].startswith("RunError: not even one row fits into memory;")


@pytest.mark.slow
def test_a_full_disk_of_the_main_process_ends_all(two: Ranks) -> None:
    for said in two.said:
        assert said["full disk"] == "RunError: metrics.jsonl: No space left on device; free some"
    assert not (two.out / "run" / RESULT).exists()


@pytest.mark.parametrize("flags", [["--data-seeds", "1,2"], ["--seeds", "1,2"]])
def test_runs_that_are_trained_together_take_one_process(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def joined() -> Iterator[processes_module.Processes]:
        yield ALONE

    monkeypatch.setattr(processes_module, "joined", joined)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    ended = CliRunner().invoke(app, [*TRAIN, *flags])
    assert ended.exit_code == 2
    assert ended.stderr.splitlines() == [
        f"error: {' '.join(flags)}: takes one process, and 2 were launched",
        "hint: start it without a launcher; several processes train one run",
    ]


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with (
        pytest.raises(ConfigError, match="2 processes were launched") as caught,
        processes_module.joined(),
    ):
        pass
    assert caught.value.hint == "install the extra: pip install 'unipelt[processes]'"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' and RANK=''"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK='2'"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "started one process"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], expected: str
) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=expected):
        processes_module.launched()


def test_one_process_does_not_wait_for_accelerate() -> None:
    code = (
        "import sys\n"
        "from unipelt_cli.system import processes\n"
        "with processes.joined() as joined:\n"
        "    assert joined is processes.ALONE and joined.is_main\n"
        "print({'torch', 'accelerate'} & sys.modules.keys())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
