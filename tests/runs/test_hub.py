"""Runs that go to a hub and come back: the same, whole or refused in words; against a fake hub."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import reset_sessions
from support import fake_hub
from support.command import error_of, invoke
from support.fake_hub import READER, TOKEN, FakeHub, Repository
from support.models import experiment

import unipelt_cli
from unipelt_cli.commands.shared.run_argument import default_output
from unipelt_cli.runs.hub import fetch
from unipelt_cli.runs.names import METRICS, MODEL, RECORDED, RESULT
from unipelt_cli.runs.run import read_experiment
from unipelt_cli.system import network
from unipelt_cli.training import execution

NAMES = {*RECORDED, RESULT}
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@pytest.fixture(scope="module")
def run(
    backbone_dir: Callable[[str], Path], rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a finished run; tests must not change it."""
    rows = {
        "task": None,
        "folds": 0,
        "train_file": str(rows_file),
        "text": "text",
        "label": "label",
        "k": 24,
    }
    training = {"epochs": 2, "batch_size": 8}
    plan = experiment(backbone_dir("bert"), "lora", data=rows, train=training)
    out = tmp_path_factory.mktemp("runs") / "first"
    for _ in execution.execute(plan, out):
        pass
    return out


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Return a hub that this process talks to as if its library had been imported with it."""
    with fake_hub.serving() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for switch in network.SWITCHES:
            monkeypatch.setenv(switch, "0")
        reset_sessions()
        yield server
        reset_sessions()


def online() -> None:
    """Take the switches back that a command has set for what comes after it."""
    os.environ |= dict.fromkeys(network.SWITCHES, "0")


def hold(hub: FakeHub, run: Path, name: str = "me/first", **changed: bytes | None) -> Repository:
    """Let a hub hold a run, with some files changed or left out."""
    own = {path.name: path.read_bytes() for path in run.iterdir()}
    files = {n: c for n, c in (own | changed).items() if c is not None}
    hub.repositories[name] = Repository()
    hub.repositories[name].add(files)
    return hub.repositories[name]


def test_a_pushed_run_is_the_same_and_says_what_is_published(hub: FakeHub, run: Path) -> None:
    code, stdout, stderr = invoke("push", run, "me/first", "--private", "--json")
    assert code == 0, stderr
    pushed = hub.repositories["me/first"]
    files = pushed.commits[pushed.head]
    assert files.keys() == NAMES | {"README.md", ".gitattributes"}
    assert all(files[name] == (run / name).read_bytes() for name in NAMES)
    assert pushed.private
    assert json.loads(stdout) == {
        "repository": "me/first",
        "url": f"{hub.url}/me/first",
        "commit": pushed.head,
        "private": True,
        "files": [*RECORDED, RESULT, "README.md"],
    }
    lines = stderr.splitlines()
    for name in files.keys() - {".gitattributes"}:
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert f"{len(files[name]):,}" in line
    (paths,) = (line for line in lines if line.startswith("note: paths of this machine"))
    settings = read_experiment(run)
    assert settings.model.backbone in paths
    assert str(settings.data.train_file) in paths
    assert "to me/first, which you and those you let in can read" in lines
    card = files["README.md"].decode()
    assert "unipelt verify hub:me/first\n" in card
    assert "## Scores" in card
    assert settings.model.backbone not in card


def test_a_run_on_the_hub_is_loaded_from_python(hub: FakeHub, run: Path) -> None:
    hold(hub, run)
    online()
    texts = ["good film", "the plot was awful"]
    there = unipelt_cli.load_run("hub:me/first")
    assert there.predict(texts) == unipelt_cli.load_run(run).predict(texts)


def test_a_fetched_run_answers_as_the_one_that_was_pushed(
    hub: FakeHub, run: Path, tmp_path: Path
) -> None:
    held = hold(hub, run, **{"pytorch_model.bin": b"pickled", "__init__.py": b"raise"})
    here, there = (json.loads(invoke("eval", own, "--json")[1]) for own in (run, "hub:me/first"))
    assert here == there
    online()
    (tmp_path / "rows.csv").write_text("text\na good film\n")
    fetched = invoke("predict", "hub:me/first@main", tmp_path / "rows.csv")
    assert fetched[:2] == invoke("predict", run, tmp_path / "rows.csv")[:2]
    kept = tmp_path / "cache" / "unipelt" / "me--first" / held.head
    assert {path.name for path in kept.iterdir()} == NAMES
    assert not any(path.is_symlink() for path in kept.iterdir())
    assert not any(name in asked for asked in hub.asked for name in ("pytorch_model", "__init__"))
    assert len([asked for asked in hub.asked if "GET /me/first/resolve" in asked]) == len(NAMES)


def test_a_commit_that_was_fetched_before_asks_nobody(hub: FakeHub, run: Path) -> None:
    name = f"hub:me/first@{hold(hub, run).head}"
    first = fetch(name, offline=False)
    asked = len(hub.asked)
    assert fetch(name, offline=False) == first
    assert len(hub.asked) == asked


def test_a_new_commit_is_fetched_and_an_old_one_can_still_be_named(hub: FakeHub, run: Path) -> None:
    held = hold(hub, run)
    old = held.head
    first = fetch("hub:me/first", offline=False)
    held.add(held.commits[old] | {"README.md": b"more"})
    assert fetch("hub:me/first", offline=False).name == held.head != old
    assert fetch(f"hub:me/first@{old}", offline=False) == first


def test_processes_with_and_without_a_network_fetch_the_same(
    hub: FakeHub, run: Path, tmp_path: Path
) -> None:
    """In processes of their own: the library reads its switches once, when it is imported."""
    hold(hub, run)
    fetch("hub:me/first", offline=False)
    hub.asked.clear()
    kept = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}

    def verify(home: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "unipelt_cli", "verify", "hub:me/first", *options]
        return subprocess.Popen(
            [*command, "--json"],
            env=kept | {"HF_HOME": str(tmp_path / home), "HF_HUB_DISABLE_XET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    started = [verify("other"), verify("cache", "--offline")]
    answers = [(*process.communicate(), process.returncode) for process in started]
    for stdout, stderr, code in answers:
        assert (code, json.loads(stdout)["ok"]) == (0, True), stderr
    assert answers[0][0] == answers[1][0]
    assert len([asked for asked in hub.asked if "GET /api/models" in asked]) == 2  # of the first


def test_what_is_not_in_the_cache_needs_the_network(
    hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(hub, run)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    assert error_of("eval", "hub:me/first", "--offline") == (
        "hub:me/first: not in the local cache, and the hub cannot be reached",
        "fetch it once with the network, or give a run directory",
    )
    assert not hub.asked


def test_a_tampered_file_is_refused(hub: FakeHub, run: Path) -> None:
    content = bytearray((run / MODEL).read_bytes())
    content[-30] ^= 1
    held = hold(hub, run, **{MODEL: bytes(content)})
    message, _ = error_of_fetched("eval", "hub:me/first")
    assert message.endswith(f"me--first/{held.head}/{MODEL}: changed since it was written")
    online()
    code, stdout, _ = invoke("verify", "hub:me/first", "--json")
    answer = json.loads(stdout)
    assert (code, answer["run"], answer["ok"]) == (1, "hub:me/first", False)
    failed = [check["what"] for check in answer["checks"] if check["passed"] is False]
    assert failed == [MODEL]


def error_of_fetched(*arguments: str) -> tuple[str, str]:
    """Return the two sentences of a command that fails after it has fetched a run."""
    code, _, stderr = invoke(*arguments)
    first, error, hint = stderr.splitlines()
    assert code == 2
    assert first.startswith(f"{arguments[1]}: commit ")
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


AGAIN = "run the command again"
NOT_THERE = (
    "hub:me/first: no such repository, or one that you may not see",
    f"check its name; for a private one {LOGIN}",
)
Spoil = Callable[[FakeHub, pytest.MonkeyPatch], object]


def private(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["me/first"].private = True
    monkeypatch.delenv("HF_TOKEN")


def changing(hub: FakeHub, _: object) -> None:
    held = hub.repositories["me/first"]
    hub.trouble["/revision/main"] = lambda: held.add(held.commits[held.head])


def lacking(hub: FakeHub, _: object) -> None:
    held = hub.repositories["me/first"]
    held.add({n: c for n, c in held.commits[held.head].items() if n != RESULT})


@pytest.mark.parametrize(
    ("spoil", "message", "hint"),
    [
        (lambda hub, _: hub.repositories.clear(), *NOT_THERE),
        (private, *NOT_THERE),
        (
            lambda _, monkeypatch: monkeypatch.setenv("HF_TOKEN", "hf_old"),
            "hub:me/first: the hub does not accept your token",
            LOGIN,
        ),
        (
            lambda hub, _: hub.trouble.update({"GET /api/models": 403}),
            "hub:me/first: the hub refuses you this",
            "use a token that may, from https://huggingface.co/settings/tokens",
        ),
        (
            lacking,
            "hub:me/first: not a whole run, there is no result.json",
            "give a repository that `unipelt push` wrote",
        ),
        (
            lambda hub, _: hub.sizes.update({METRICS: 10**9}),
            "hub:me/first: metrics.jsonl has 1,000,000,000 bytes, a run's has 100,000,000 at most",
            "do not use this run: nothing of it was fetched",
        ),
        (changing, "hub:me/first: the repository has changed meanwhile", AGAIN),
    ],
)
def test_what_cannot_be_fetched_is_said_in_two_lines_and_leaves_nothing(
    hub: FakeHub,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Spoil,
    message: str,
    hint: str,
) -> None:
    hold(hub, run)
    spoil(hub, monkeypatch)
    assert error_of("eval", "hub:me/first") == (message, hint)
    assert not (tmp_path / "cache" / "unipelt").exists()


@pytest.mark.parametrize(
    ("spoil", "start", "hint"),
    [
        ({"GET /me/first/resolve": "cut"}, "the connection to the hub broke (", AGAIN),
        ({"GET /api/models": 500}, "the hub answers with an error (500 Server", "try again later"),
    ],
)
def test_a_failing_hub_is_said_in_two_lines(
    hub: FakeHub, run: Path, spoil: dict[str, int | str], start: str, hint: str
) -> None:
    hold(hub, run)
    hub.trouble |= spoil
    message, said = error_of("eval", "hub:me/first")
    assert message.startswith(f"hub:me/first: {start}")
    assert said == hint
    hub.trouble.clear()
    online()
    assert invoke("eval", "hub:me/first")[0] == 0


def test_a_revision_that_is_not_there_is_said(hub: FakeHub, run: Path) -> None:
    hold(hub, run)
    assert error_of("predict", "hub:me/first@v2", "-") == (
        "hub:me/first@v2: no such revision",
        "give a branch, a tag or a commit that is there",
    )


@pytest.mark.parametrize("name", ["hub:first", "hub:", "hub:a/b/c", "hub:../b", "hub:a/b@"])
def test_a_name_that_is_none_is_said(name: str) -> None:
    assert error_of("inspect-gates", name) == (
        f"{name}: names no repository on the hub",
        "write hub:OWNER/NAME, or hub:OWNER/NAME@REVISION",
    )


def test_a_full_disk_leaves_no_part_of_a_run(
    hub: FakeHub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(hub, run)
    copies = []

    def copy(source: Path, target: Path) -> None:
        copies.append(target)
        if len(copies) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", copy)
    message, hint = error_of("eval", "hub:me/first")
    assert message.endswith(": cannot be written (No space left on device)")
    assert hint == "free space, or set HF_HOME to another place"
    assert not list((tmp_path / "cache" / "unipelt" / "me--first").iterdir())


def test_what_is_made_of_a_fetched_run_goes_here() -> None:
    assert default_output(Path("hub:me/first@refs/pr/1"), "hf") == Path("first-hf")
    assert default_output(Path("hub:me/first"), "reproduced") == Path("first-reproduced")


def push_error(run: Path, *options: str) -> tuple[str, str]:
    """Return the two sentences of a push that fails, whatever it has shown before."""
    code, stdout, stderr = invoke("push", run, "me/first", *options)
    error, hint = stderr.splitlines()[-2:]
    assert (code, stdout) == (2, "")
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


def test_a_run_that_is_there_is_replaced_only_if_asked_to(hub: FakeHub, run: Path) -> None:
    held = hold(hub, run, **{RESULT: b"{}", "README.md": b"mine"})
    before = held.head
    refused = ("me/first: holds a run already", "replace it with --overwrite, or give another name")
    assert push_error(run) == refused
    assert held.head == before
    online()
    code, _, stderr = invoke("push", run, "me/first", "--overwrite")
    assert code == 0, stderr
    assert held.commits[held.head][RESULT] == (run / RESULT).read_bytes()
    assert "to me/first, which anyone can read" in stderr.splitlines()


@pytest.mark.parametrize(
    ("spoil", "options", "message", "hint"),
    [
        (
            lambda hub, _: hub.repositories["me/first"].add({"weights.bin": b""}),
            ["--overwrite"],
            "holds files that no run wrote, such as weights.bin",
            "give another name",
        ),
        (
            lambda *_: None,
            ["--overwrite", "--private"],
            "exists already, and is public",
            "make it private on its page first, or drop --private",
        ),
        (
            lambda _, monkeypatch: monkeypatch.setenv("HF_TOKEN", READER),
            ["--overwrite"],
            "the hub refuses you this",
            "use a token that may, from https://huggingface.co/settings/tokens",
        ),
        (
            lambda _, monkeypatch: monkeypatch.delenv("HF_TOKEN"),
            [],
            "not logged in to the hub",
            LOGIN,
        ),
        (
            lambda _, monkeypatch: monkeypatch.setenv("HF_HUB_OFFLINE", "1"),
            [],
            "the hub cannot be reached",
            "connect to the network, and leave HF_HUB_OFFLINE unset",
        ),
        (
            lambda hub, _: hub.trouble.update(
                {"/commit/main": lambda: hub.repositories["me/first"].add({})}
            ),
            ["--overwrite"],
            "the repository has changed meanwhile",
            AGAIN,
        ),
        (
            lambda hub, _: hub.trouble.update({"PUT /large": 403}),
            ["--overwrite"],
            "the hub refuses you this",
            "use a token that may, from https://huggingface.co/settings/tokens",
        ),
    ],
)
def test_what_cannot_be_pushed_is_said_and_changes_nothing(
    hub: FakeHub,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Spoil,
    options: list[str],
    message: str,
    hint: str,
) -> None:
    hold(hub, run)
    spoil(hub, monkeypatch)
    held = hub.repositories["me/first"].commits
    assert push_error(run, *options) == (f"me/first: {message}", hint)
    assert not any(MODEL in files and "README.md" in files for files in held.values())


def test_a_damaged_run_is_not_pushed(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    with (copy / METRICS).open("a") as file:
        file.write("\n")
    message, _ = push_error(copy)
    assert message == f"{copy / METRICS}: changed since it was written"
    assert not hub.repositories
