"""Run directories that somebody damaged, by accident or not: read right, or refused in words."""

import json
import os
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from support.fuzzing import changed, damaged, limited, outcome, tell
from support.models import experiment
from support.runs import reseal
from typer.testing import CliRunner

from unipelt_cli.cli import app
from unipelt_cli.files import sealed
from unipelt_cli.runs import verification
from unipelt_cli.runs.names import (
    ENVIRONMENT,
    EXPERIMENT,
    METRICS,
    MODEL,
    PREDICTIONS,
    PROBE,
    RECORDED,
    RESULT,
    STATE,
)
from unipelt_cli.runs.progress import describe_progress, read_state
from unipelt_cli.runs.run import read_experiment
from unipelt_cli.runs.run import read_run as run_read
from unipelt_cli.training import execution
from unipelt_cli.training.session import Session

FLIPPED = 600  # damaged bytes, over all files
CHANGED = 900  # other values, with hashes that vouch for them
STATES = 300
COMMANDS = 42
MEMORY = 300 * 2**20  # beside the library's own


@pytest.fixture(scope="module")
def whole(
    backbone_dir: Callable[[str], Path], rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a finished run, and beside it one that was stopped."""
    rows = {
        "task": None,
        "folds": 0,
        "train_file": str(rows_file),
        "text": "text",
        "label": "label",
        "k": 24,
    }
    planned = experiment(
        backbone_dir("bert"),
        "unipelt-apl",
        data=rows,
        options={"prefix_length": 3, "prefix_width": 8, "rank": 2},
        train={"epochs": 2, "batch_size": 8},
    )
    out = tmp_path_factory.mktemp("runs") / "whole"
    for _ in execution.execute(planned, out):
        pass
    events = execution.execute(planned, out.with_name("stopped"))
    for _ in range(3):
        next(events)
    events.close()
    return out


@pytest.fixture(scope="module")
def stopped(whole: Path) -> Path:
    return whole.with_name("stopped")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_no_damaged_byte_of_a_finished_run_passes(whole: Path, copy: Path) -> None:
    chosen, seen = random.Random(1), Counter[str]()
    names = [*RECORDED, RESULT]
    for turn in range(FLIPPED):
        name = names[turn % len(names)]
        content = (whole / name).read_bytes()
        other = damaged(content, chosen)
        if other == content:
            continue
        (copy / name).write_bytes(other)
        with limited():
            checks = list(verification.verify(copy))
        assert any(check.ok is False for check in checks), (turn, name)
        if name != METRICS:  # which only `verify` looks at
            assert outcome(lambda: run_read(copy)) == "refused", (turn, name)
        seen[name] += 1
        (copy / name).write_bytes(content)
    assert min(seen[name] for name in names) > FLIPPED / 10
    run_read(copy).build()
    tell("damaged bytes, all refused", seen)


@pytest.mark.parametrize("name", [EXPERIMENT, ENVIRONMENT, RESULT, METRICS])
def test_other_values_under_right_hashes_are_read_or_refused(copy: Path, name: str) -> None:
    chosen, seen = random.Random(name), Counter[str]()
    path = copy / name
    text = path.read_text()
    for turn in range(CHANGED // 4):
        if name == EXPERIMENT:
            path.write_bytes(changed_lines(text, chosen))
        elif name == METRICS:
            lines = [changed(json.loads(line), chosen) for line in text.splitlines()]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            path.write_text(json.dumps(changed(json.loads(text), chosen)))
        if name == RESULT:
            value = json.loads(path.read_text())
            if isinstance(value, dict):
                path.write_text(json.dumps(sealed.with_seal(value), indent=2) + "\n")
        else:
            reseal(copy)

        def read(turn: int = turn) -> None:
            run = run_read(copy)
            describe_progress(copy)
            verification.differences(run, run)
            if turn % 5 == 0:
                list(verification.verify(copy))

        seen[outcome(read)] += 1
    assert seen["read"] > 3
    assert name == METRICS or seen["refused"] > CHANGED / 20
    tell(f"{name}, other values", seen)


def changed_lines(text: str, chosen: random.Random) -> bytes:
    """Return TOML with one of its lines damaged."""
    lines = text.encode().splitlines()
    at = chosen.randrange(len(lines))
    key = lines[at].partition(b" = ")[0]
    values = [
        *(b"1" * 5000, b"-1", b"nan", b"inf", b"1979-05-27T07:32:00Z", b'"\\ud800"', b"{a = {}}"),
        *(b"[" * 3000, b"[" * 50 + b"]" * 50, b"'''", b"true", b'""', b"1e400", b"0x" + b"f" * 300),
    ]
    match chosen.randrange(4):
        case 0:
            lines[at] = key + b" = " + chosen.choice(values)
        case 1:
            lines.insert(at, lines[at])
        case 2:
            lines[at] = damaged(lines[at] or b"x", chosen)
        case _:
            del lines[at]
    return b"\n".join(lines)


@pytest.mark.parametrize("name", [MODEL, PROBE, PREDICTIONS])
def test_tensor_files_with_other_headers_are_read_or_refused(copy: Path, name: str) -> None:
    chosen, seen = random.Random(name), Counter[str]()
    tensors, header = sealed.open_tensors(copy / name)
    del header[sealed.SEAL]
    for _ in range(CHANGED // 12):
        other = changed(header, chosen)
        if not isinstance(other, dict):
            continue
        sealed.write_tensors(copy / name, tensors, other)
        reseal(copy)
        seen[outcome(lambda: use(copy))] += 1
    assert seen["refused"] > 3 or name != MODEL
    assert seen["read"] > 3
    tell(f"{name}, other headers", seen)


def use(directory: Path) -> None:
    """Read all that a finished run holds."""
    run = run_read(directory)
    run.build()
    run.predictions()


def test_predictions_that_cannot_be_the_tasks_are_refused(copy: Path) -> None:
    path = copy / PREDICTIONS
    tensors, header = sealed.open_tensors(path)
    del header[sealed.SEAL]
    assert tensors.keys() == {"predictions.0", "references.0"}
    found = run_read(copy).predictions()
    assert found is not None
    assert [values.dtype.name for values in found] == ["int64", "int64"]
    own = tensors["predictions.0"]
    others = [own[:-1], own[:0], own + 2, own - 2, own.double(), own.long(), own[None], None]
    for other in others:
        changed = {"predictions.0": other, "references.0": tensors["references.0"]}
        kept = {key: tensor for key, tensor in changed.items() if tensor is not None}
        sealed.write_tensors(path, kept, header)
        reseal(copy)
        assert outcome(lambda: run_read(copy).predictions()) == "refused", other


def foreign(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + data


FOREIGN = {
    "nothing": b"",
    "zeros": bytes(64),
    "a huge header": foreign(b"{}", size=2**62),
    "a header longer than the file": foreign(b"{}", size=10_000),
    "no object": foreign(b"[]"),
    "deep": foreign(b"[" * 100_000),
    "no header of ours": foreign(
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "a huge shape": foreign(
        b'{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}', bytes(4)
    ),
    "offsets beyond": foreign(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000]}}'),
    "offsets backwards": foreign(
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', bytes(4)
    ),
    "tensors that overlap": foreign(
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"y":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "a name twice": foreign(
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "a type of its own": foreign(
        b'{"x":{"dtype":"Q7","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtin\x94.",
    "a zip": b"PK\x03\x04" + bytes(40),
    **{
        f"our header is {text}": foreign(json.dumps({"__metadata__": {"unipelt": text}}).encode())
        for text in ("", "[]", "null", "{}", '{"sha256": 1}', '{"sha256": ""}', "[" * 2000)
    },
}


@pytest.mark.parametrize("name", [MODEL, PROBE, PREDICTIONS, STATE])
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_tensor_files_are_refused(
    copy: Path, stopped: Path, tmp_path: Path, content: bytes, name: str
) -> None:
    if name == STATE:
        copy = Path(shutil.copytree(stopped, tmp_path / "stopped"))
    (copy / name).write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == STATE:
        assert outcome(lambda: take_up(copy)) == "refused"
    else:
        reseal(copy)
        assert outcome(lambda: use(copy)) == "refused"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def take_up(directory: Path) -> None:
    """Take up what a stopped run goes on from."""
    session = Session(read_experiment(directory), directory, "resume")
    with closing(session.writer):
        session.check()
        session.open()


def test_states_with_other_values_are_taken_up_or_refused(stopped: Path, tmp_path: Path) -> None:
    chosen, seen = random.Random(3), Counter[str]()
    copy = Path(shutil.copytree(stopped, tmp_path / "stopped"))
    path = copy / STATE
    content = path.read_bytes()
    tensors, header = sealed.open_tensors(path)
    del header[sealed.SEAL]
    for turn in range(STATES):
        if turn % 3 == 0:
            path.write_bytes(damaged(content, chosen))
            assert outcome(lambda: read_state(copy)) == "refused", turn
            seen["damaged"] += 1
            continue
        own = dict(tensors)
        if turn % 3 == 1:
            name = chosen.choice(list(own))
            tensor = own.pop(name)
            other = chosen.choice(
                [tensor.reshape(-1)[:0], tensor.double(), tensor.unsqueeze(0), None]
            )
            if other is not None:
                own[name] = other
            else:
                own[chosen.choice(["now.x", "exp_avg.", "x", "best.x"])] = tensor
            sealed.write_tensors(path, own, header)
        elif isinstance(other := changed(header, chosen), dict):
            sealed.write_tensors(path, own, {**header, **other})
        seen[outcome(lambda: take_up(copy))] += 1
    assert min(seen["refused"], seen["read"], seen["damaged"]) > 10
    tell("states", seen)


def test_damaged_runs_end_a_command_in_two_lines(whole: Path, copy: Path, rows_file: Path) -> None:
    chosen, seen = random.Random(4), Counter[int]()
    commands = [("eval", copy), ("predict", copy, rows_file), ("inspect-gates", copy)]
    commands += [("export", copy, "--to", "adapters"), ("verify", copy), ("reproduce", copy)]
    names = [*RECORDED, RESULT]
    for turn in range(COMMANDS):
        name, command = names[turn % len(names)], commands[turn // len(names) % len(commands)]
        content = (whole / name).read_bytes()
        (copy / name).write_bytes(damaged(content, chosen))
        with limited():
            result = CliRunner().invoke(app, [*map(str, command)], prog_name="unipelt")
        assert isinstance(result.exception, SystemExit) or name == METRICS, result.exception
        lines = [line.partition(":")[0] for line in result.stderr.splitlines()[-2:]]
        assert result.exit_code == 0 or lines == ["error", "hint"]
        assert result.exit_code == {"verify": 1}.get(command[0], 0 if name == METRICS else 2)
        seen[result.exit_code] += 1
        (copy / name).write_bytes(content)
        for made in ("adapters", "reproduced"):
            shutil.rmtree(copy.with_name(f"run-{made}"), ignore_errors=True)
    assert min(seen.values()) >= 5


@pytest.mark.parametrize("name", [*RECORDED, RESULT])
@pytest.mark.parametrize("kind", ["link out", "link beside", "pipe", "directory", "device"])
def test_only_files_of_the_run_itself_are_read(
    copy: Path, tmp_path: Path, name: str, kind: str
) -> None:
    path = copy / name
    if kind == "link out":
        path.rename(tmp_path / "outside")
        path.symlink_to(tmp_path / "outside")
    elif kind == "link beside":
        path.rename(copy / "beside")
        path.symlink_to("beside")
        run_read(copy).build()
        return
    else:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero")
    if name == METRICS:
        (check,) = [check for check in verification.verify(copy) if check.what == name]
        assert check.ok is False
    else:
        assert outcome(lambda: run_read(copy)) == "refused"


@pytest.mark.parametrize("name", [STATE, METRICS, EXPERIMENT, ".lock"])
def test_going_on_follows_no_link_out_of_a_run(stopped: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(stopped, tmp_path / "run"))
    outside = tmp_path / "outside"
    outside.write_bytes((copy / name).read_bytes() if name != ".lock" else b"mine")
    before = outside.read_bytes()
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(outside)
    assert outcome(lambda: take_up(copy)) == "refused"
    assert outside.read_bytes() == before


def test_overwriting_removes_links_and_not_what_they_lead_to(stopped: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stopped, tmp_path / "run"))
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (copy / METRICS).unlink()
    (copy / METRICS).symlink_to(outside)
    for _ in execution.execute(read_experiment(copy), copy, "overwrite"):
        pass
    assert outside.read_text() == "mine"
    run_read(copy).build()
