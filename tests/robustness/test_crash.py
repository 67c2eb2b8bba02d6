"""Runs that are killed, and what is left of them: never a part that passes for the whole."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import experiment
from typer.testing import CliRunner

from unipelt_cli.cli import app
from unipelt_cli.commands import listing
from unipelt_cli.config.experiment import Experiment
from unipelt_cli.data import preparation
from unipelt_cli.data.prepared_directory import save_prepared
from unipelt_cli.errors import RunError, UnipeltError
from unipelt_cli.exports import export, job, model_card
from unipelt_cli.files import lock, sealed
from unipelt_cli.runs.names import EXPERIMENT, MODEL, PREDICTIONS, PROBE, RECORDED, RESULT
from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.runs.run import read_run as run_read
from unipelt_cli.training import execution, session

SEED = 5
POINTS = 24  # of some hundred operations on files
MOMENTS = 20
TIMES = ("seconds", "train_seconds", "evaluation_seconds", "tokens_per_second", "peak_memory_bytes")
FULL = 12
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}

Watch = Callable[[int, str], None]


def mostly_slow(count: int, step: int) -> list[Any]:
    """Number the places where a run may stop; all but every `step`-th are for the slow tests."""
    slow = pytest.mark.slow
    return [pytest.param(turn, marks=() if turn % step == 0 else slow) for turn in range(count)]


@pytest.fixture(scope="module")
def planned(backbone_dir: Callable[[str], Path], rows_file: Path) -> Experiment:
    rows = {
        "task": None,
        "folds": 0,
        "train_file": str(rows_file),
        "text": "text",
        "label": "label",
        "k": 24,
    }
    return experiment(
        backbone_dir("bert"),
        "unipelt-apl",
        data=rows,
        options={"prefix_length": 3, "prefix_width": 8, "rank": 2},
        train={"epochs": 3, "batch_size": 8, "learning_rate": 0.01},
    )


def watch_changes(watch: Watch | None) -> Callable[[], int]:
    """From now on tell of each change of a file in this process; return how many there were."""
    changes = 0

    def count(event: str, given: tuple[Any, ...]) -> None:
        nonlocal changes
        writes = event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or (writes and given[0] != os.devnull):
            changes += 1
            if watch is not None:
                watch(changes, event)

    sys.addaudithook(count)
    return lambda: changes


def carry_out(planned: Experiment, out: Path, mode: Any, watch: Watch | None = None) -> None:
    """Carry a run out, saving after every step; `watch` is told of each change of a file."""
    session.STATE_SECONDS, session.STATE_SHARE = 0.0, float("inf")
    changes = watch_changes(watch)
    for _ in execution.execute(planned, out, mode):
        pass
    (out.parent / f"{out.name}.changes").write_text(str(changes()))


def start(do: Callable[[], None]) -> tuple[int, int]:
    """Do something in a process that has all imported; return its number and where it talks."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads, which do nothing
        number = os.fork()
    if number == 0:
        code = 0
        try:
            do()
        except UnipeltError as error:
            os.write(write, error.message.encode())
            code = error.exit_code
        except BaseException:
            os.write(write, traceback.format_exc().encode())
            code = 99
        finally:
            os._exit(code)
    os.close(write)
    return number, read


def end(process: tuple[int, int]) -> tuple[int, str]:
    """Wait for a process; return its exit code and what it said."""
    number, read = process
    with os.fdopen(read) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), said


def finish(
    planned: Experiment, out: Path, mode: str, watch: Watch | None = None
) -> tuple[int, str]:
    return end(start(lambda: carry_out(planned, out, mode, watch)))


def killed_at(last: int) -> Watch:
    def watch(change: int, event: str) -> None:
        if change == last:
            os.kill(os.getpid(), signal.SIGKILL)

    return watch


def full_from(first: int) -> Watch:
    """Return what a full disk does: nothing new can be made, but it can be removed."""

    def watch(change: int, event: str) -> None:
        if change >= first and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return watch


@pytest.fixture(scope="module")
def whole(planned: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(planned, out, "new") == (0, "")
    return out


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: own for k, own in value.items() if k not in (*TIMES, "files", "sha256")}
        return {key: without_times(own) for key, own in kept.items()}
    return value


def check_equal(found: Path, whole: Path) -> None:
    """Check that a run ended as the one that nobody interrupted, and left nothing else."""
    for name in (MODEL, PROBE, EXPERIMENT, PREDICTIONS):
        assert (found / name).read_bytes() == (whole / name).read_bytes(), name
    events, expected = (list(map(without_times, read_metrics(d))) for d in (found, whole))
    assert events == expected
    results = [json.loads((d / RESULT).read_text()) for d in (found, whole)]
    assert without_times(results[0]) == without_times(results[1])
    assert {path.name for path in found.iterdir()} == {*RECORDED, RESULT}
    run_read(found).build()


def changes_of(whole: Path) -> int:
    return int((whole.parent / f"{whole.name}.changes").read_text())


@pytest.mark.parametrize("turn", mostly_slow(POINTS, 8))
def test_a_run_killed_at_any_change_of_a_file_ends_as_if_nothing_had_happened(
    planned: Experiment, whole: Path, tmp_path: Path, turn: int
) -> None:
    out, chosen = tmp_path / "run", random.Random(SEED + turn)
    first = 1 + int(changes_of(whole) / POINTS * (turn + chosen.random()))
    assert finish(planned, out, "resume", killed_at(first))[0] == -signal.SIGKILL
    second, _ = finish(planned, out, "resume", killed_at(chosen.randint(1, 80)))
    assert second in (-signal.SIGKILL, 0)
    assert finish(planned, out, "resume") == (0, "")
    check_equal(out, whole)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(
    planned: Experiment, whole: Path, tmp_path: Path
) -> None:
    out, chosen, killed = tmp_path / "run", random.Random(SEED), 0
    seconds = json.loads((whole / RESULT).read_text())["seconds"]
    for _ in range(MOMENTS):
        process = start(lambda: carry_out(planned, out, "resume"))
        time.sleep(chosen.random() * seconds)
        os.kill(process[0], signal.SIGKILL)
        killed += end(process)[0] == -signal.SIGKILL
    assert killed > 0
    assert finish(planned, out, "resume") == (0, "")
    check_equal(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_runs_that_share_passes_survive_as_well(
    planned: Experiment, tmp_path: Path, share: float
) -> None:
    """Within rounding: who shares a pass decides how sums are rounded, and that has changed."""
    plans = [planned.with_("train", seed=seed) for seed in (1, 2, 3)]

    def together(root: Path, watch: Watch | None) -> None:
        session.STATE_SECONDS, session.STATE_SHARE = 0.0, float("inf")
        changes = watch_changes(watch)
        directories = [root / str(number) for number in range(3)]
        for _ in execution.execute_together(plans, directories, "resume"):
            pass
        (root / "changes").write_text(str(changes()))

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert end(start(partial(together, whole, None))) == (0, "")
    last = int(share * int((whole / "changes").read_text()))
    assert end(start(partial(together, killed, killed_at(last))))[0] == -signal.SIGKILL
    assert end(start(partial(together, killed, None))) == (0, "")
    for number in map(str, range(3)):
        one, other = (run_read(root / number) for root in (whole, killed))
        for name in ("best_epoch", "epochs", "dev", "test"):
            assert one.result[name] == other.result[name]
        tensors = [sealed.open_tensors(run.directory / MODEL)[0] for run in (one, other)]
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(tensor, tensors[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("turn", mostly_slow(FULL, 4))
def test_a_disk_that_is_full_from_any_moment_costs_nothing_but_time(
    planned: Experiment, whole: Path, tmp_path: Path, turn: int
) -> None:
    out = tmp_path / "run"
    first = 1 + int((changes_of(whole) - 8) * turn / (FULL - 1))
    code, said = finish(planned, out, "resume", full_from(first))
    assert code == 2
    assert said.startswith(str(out))
    assert said.endswith(": cannot be written (No space left on device)")
    assert not (out / RESULT).exists()
    assert finish(planned, out, "resume") == (0, "")
    check_equal(out, whole)


@pytest.mark.parametrize("limit", [10, 500, 3_000, 20_000])
def test_files_cut_short_by_a_limit_are_never_taken_for_whole(
    planned: Experiment, whole: Path, tmp_path: Path, limit: int
) -> None:
    """Where a quota ends, the first part of a file is written and the rest is not."""
    out = tmp_path / "run"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        carry_out(planned, out, "resume")

    code, said = end(start(limited))
    assert code == 2
    assert re.fullmatch(
        rf"{re.escape(str(out))}/[a-z]+\.\w+: cannot be written \(File too large.*", said
    )
    assert not (out / RESULT).exists()
    assert finish(planned, out, "resume") == (0, "")
    check_equal(out, whole)


def test_of_many_that_write_one_directory_one_wins(
    planned: Experiment, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    processes = [start(lambda: carry_out(planned, out, "new")) for _ in range(6)]
    ended = [end(process) for process in processes]
    assert sorted(code for code, _ in ended) == [0, 2, 2, 2, 2, 2]
    for code, said in ended:
        held = re.fullmatch(rf"{out}: process \d+ on .+ is writing there", said)
        assert said == f"{out}: exists already" or held or code == 0, said
    check_equal(out, whole)


@pytest.mark.parametrize("mode", ["new", "resume", "overwrite"])
def test_a_running_run_is_not_disturbed(
    planned: Experiment, whole: Path, tmp_path: Path, mode: Any
) -> None:
    out = tmp_path / "run"
    events = execution.execute(planned, out)
    next(events)
    before = {path: path.read_bytes() for path in out.iterdir()}
    (listed,) = listing.entries("runs", tmp_path, None)
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert listed["status"] == f"epoch 0 done, {owner} is at it"
    assert finish(planned, out, mode) == (
        2,
        f"{out}: process {os.getpid()} on {socket.gethostname()} is writing there",
    )
    with pytest.raises(RunError, match=f"process {os.getpid()} on .* is writing there"):
        next(execution.execute(planned, out, mode))
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    for _ in events:
        pass
    check_equal(out, whole)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("make", ["run", "data"])
def test_where_nobody_may_write_nothing_is_written(
    planned: Experiment, tmp_path: Path, make: str
) -> None:
    for path in takewhile(lambda path: path.name != "tmp", (tmp_path, *tmp_path.parents[:-1])):
        path.chmod(path.stat().st_mode | 0o555)
    prepared = preparation.prepare(planned.data)

    def as_nobody() -> None:
        os.setuid(65534)
        if make == "run":
            carry_out(planned, tmp_path / make, "new")
        else:
            save_prepared(prepared, tmp_path / make)

    code, said = end(start(as_nobody))
    assert (code, said) == (2, f"{tmp_path / make}: cannot be written (Permission denied)")
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_holds_nobody_up(
    planned: Experiment, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert finish(planned, out, "new", killed_at(60))[0] == -signal.SIGKILL
    assert (out / lock.LOCK).is_file()
    assert finish(planned, out, "resume") == (0, "")
    check_equal(out, whole)


@pytest.mark.parametrize(
    ("owner", "is_held"),
    [
        ({"pid": os.getpid(), "host": socket.gethostname()}, True),
        ({"pid": 2**22 + 1, "host": socket.gethostname()}, False),  # beyond every process
        ({"pid": 1, "host": "elsewhere"}, True),
        ({"pid": "x"}, False),
        ([], False),
    ],
)
def test_without_locks_in_the_file_system_the_named_owner_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, is_held: bool
) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lock.fcntl, "flock", missing)
    (tmp_path / lock.LOCK).write_text(json.dumps(owner))
    if is_held:
        with pytest.raises(RunError, match="is writing there"):
            lock.DirectoryLock(tmp_path)
    else:
        with lock.DirectoryLock(tmp_path):
            said = json.loads((tmp_path / lock.LOCK).read_text())
            assert said == {"pid": os.getpid(), "host": socket.gethostname()}
        assert not (tmp_path / lock.LOCK).exists()


def test_a_backbone_that_changed_since_a_run_began_is_named(
    planned: Experiment, tmp_path: Path
) -> None:
    backbone = Path(shutil.copytree(planned.model.backbone, tmp_path / "bert"))
    changed = planned.with_("model", backbone=str(backbone))
    out = tmp_path / "run"
    assert finish(changed, out, "new", killed_at(60))[0] == -signal.SIGKILL
    words = (backbone / "vocab.txt").read_text()
    (backbone / "vocab.txt").write_text(words.replace("good\nbad", "bad\ngood"))
    code, said = finish(changed, out, "resume")
    assert code == 2
    assert said.startswith(f"{out}: trained on backbone {backbone} (")
    assert said.endswith("): other vocab.txt")


@pytest.mark.parametrize(
    "what",
    ["prepare", *(pytest.param(what, marks=pytest.mark.slow) for what in ("adapters", "hf"))],
)
def test_a_directory_is_made_whole_or_not_at_all(
    planned: Experiment,
    backbone_dir: Callable[[str], Path],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    monkeypatch.setattr(job, "ROWS", 8)  # comparing takes longest, and writes nothing
    if what == "hf":  # folds what can be folded
        rows, backbone = planned.data.model_dump(exclude_unset=True), backbone_dir("bert")
        training = {"epochs": 1, "batch_size": 8}
        folded = experiment(
            backbone, "lora", data=rows, train=training, model={"pooling": "native"}
        )
        whole = tmp_path / "lora"
        assert finish(folded, whole, "new") == (0, "")
    prepared = preparation.prepare(planned.data)
    run = run_read(whole)

    def make(out: Path) -> None:
        if what == "prepare":
            save_prepared(prepared, out)
        else:
            export.export_run(run, run.build(), what, out)

    def interrupted(out: Path, watch: Watch) -> None:
        watch_changes(watch)
        make(out)

    def content(directory: Path) -> dict[str, bytes]:
        files = (path for path in directory.rglob("*") if path.is_file())
        return {
            # What a card measures differs in its last digits.
            str(path.relative_to(directory)): b""
            if path.name == model_card.FILE
            else path.read_bytes()
            for path in files
        }

    make(tmp_path / "expected")
    expected = content(tmp_path / "expected")
    ended = set()
    for last in range(1, 60):
        for damage in (killed_at, full_from):
            out = tmp_path / f"{damage.__name__}-{last}" / "out"
            code, said = end(start(partial(interrupted, out, damage(last))))
            ended.add(code)
            assert code in (-signal.SIGKILL, 0, 2), said
            assert not out.exists() or content(out) == expected
            assert code != 0 or out.exists()
        if code == 0:
            break
    assert ended == {-signal.SIGKILL, 0, 2}


NAMES = [
    "with a space",
    "überraschung-Привет-雪",
    "x" * 200,
    "-dash",
    "a'b\"c$(d)",
    "%s {0} [bold]x",
]


@pytest.mark.parametrize("name", NAMES)
def test_paths_of_every_kind_serve(
    backbone_dir: Callable[[str], Path],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    root = tmp_path / name
    shutil.copytree(backbone_dir("bert"), root / "bert")
    shutil.copy(rows_file, root / "rows.csv")
    monkeypatch.chdir(tmp_path)
    columns = ["--text", "text", "--label", "label"]

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [*map(str, arguments)], prog_name="unipelt")
        assert result.exit_code == 0, result.stderr
        return result.stdout

    own = f"./{name}"  # as a shell gives it
    cut = ["--k", 20, "--folds", "none"]  # with test rows, which `eval` asks for
    run("prepare", "--train-file", f"{own}/rows.csv", *columns, *cut, "--out", f"{own}/data")
    small = ["--set", "train.epochs=1", "--set", "train.batch_size=8"]
    method = ["--method", "lora", "--model", f"{own}/bert", "--set", "model.pooling=native"]
    given = ["train", "--prepared", f"{own}/data", *method, *small, "--out", f"{own}/run"]
    result = json.loads(run(*given, "--json"))
    assert json.loads(run("eval", f"{own}/run", "--json"))["scores"] == result["test"]
    assert len(run("predict", f"{own}/run", f"{own}/rows.csv").splitlines()) == 60
    run("export", f"{own}/run", "--to", "hf", "--out", f"{own}/hf")
    run("list", "runs", own)
    assert {path.name for path in root.iterdir()} == {"bert", "rows.csv", "data", "run", "hf"}
