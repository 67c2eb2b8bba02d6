"""The README's commands are run, and the output that it shows has today's form."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from support.command import rows_options

import unipelt_cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHEAP = " --set train.epochs=1"


BETWEEN = re.compile(r"(?<=<!-- methods: ).*(?=<!-- end of methods -->)", re.DOTALL)


def methods_markdown() -> str:
    """Return the README's table of methods: what is in the table of the code, counted."""
    from unipelt_cli.commands import listing
    from unipelt_cli.terminal.summaries import RATES
    from unipelt_cli.text import rates

    lines = [
        "| `--method` | what trains, beside the head | paper | rate: ours (the paper's) "
        "| trainable | stored | merges |",
        "|---|---|---|---|--:|--:|---|",
    ]
    category = None
    for entry in listing.entries("methods", Path()):
        if entry["category"] != category:
            category = entry["category"]
            lines.append(f"| **{category}** | | | | | | |")
        merges = "yes" if entry["mergeable"] else ""
        lines.append(
            f"| `{entry['name']}` | {entry['what']} | {entry['paper']} "
            f"| {rates(*(entry[key] for key in RATES))} "
            f"| {entry['trainable']:,} | {entry['stored']:,} | {merges} |"
        )
    return "\n".join(lines) + "\n"


def with_methods(readme: str) -> str:
    """Return the README with the table of methods that the code holds today."""
    said = "written by `python tests/documentation/test_readme.py` -->"
    return BETWEEN.sub(lambda _: f"{said}\n\n{methods_markdown()}\n", readme)


def transcripts() -> list[tuple[str, list[str]]]:
    """Return the README's commands, each with the output shown below it."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def form(line: str) -> str:
    """Reduce a line to its form: no digits, hashes, bars or probabilities, single blanks."""
    line = re.sub(r"\bsha256 [0-9a-f]{12}\b", "sha256", line)
    line = re.sub(r"-[0-9a-f]{8}\b", "-hash", line)
    line = re.sub(r"\b(fp32|bf16)(?=$| on cpu)", "precision", line)  # by the machine
    line = re.sub(r"[█▏▎▍▌▋▊▉·]+", "=", re.sub(r'"label": "\w+"', "", line))
    line = re.sub(r"-?[\d.,]+(e-?#*\d+,?)?", "#", line.rstrip(" *"))
    return " ".join(line.split())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the user's own file that the README speaks of."""
    directory = tmp_path_factory.mktemp("readme")
    kinds = {"fault": "broken", "refund": "too dear", "status": "late"}
    rows = [
        f"number {i} is {word},{label}"
        for i, (label, word) in zip(range(100), cycle(kinds.items()), strict=False)
    ]
    (directory / "mine.csv").write_text("message,topic\n" + "\n".join(rows) + "\n")
    return directory


def run_in(
    directory: Path, command: str, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of the shell as a user of this installation does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=directory,
        input=stdin,
    )


def test_the_first_screen_holds_the_two_commands() -> None:
    commands = [command for command, _ in transcripts()]
    assert commands[0] == "pip install '.[demo]' && unipelt train --task demo --k 100"
    assert commands[1] == "pip install -e '.[dev]' && pytest -n auto"
    run = (ROOT / ".ci" / "run").read_text()
    assert "pip install --quiet -e '.[dev]'" in run
    assert "\npytest -n auto\n" in run


@pytest.mark.slow
def test_every_command_runs_and_prints_what_is_shown(workplace: Path) -> None:
    """In order, since later commands use the first one's run; one epoch instead of fifty."""
    ran = 0
    for command, shown in transcripts():
        command = command.removeprefix("pip install '.[demo]' && ")
        if command.startswith("pip "):
            continue
        cheap = re.sub(r"^unipelt (train|sweep) .*", lambda match: match[0] + CHEAP, command)
        result = run_in(workplace, cheap)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        printed = {form(line) for line in (result.stdout + result.stderr).splitlines()}
        missing = [line for line in shown if line != "..." and form(line) not in printed]
        assert not missing, f"{command} does not print: {missing}\nbut: {sorted(printed)}"
        ran += 1
    assert ran >= 7


def test_indented_commands_resolve() -> None:
    from unipelt_cli.config import toml
    from unipelt_cli.config.experiment import merge_settings, resolve
    from unipelt_cli.config.presets import read_preset
    from unipelt_cli.config.sections import Settings

    commands = re.findall(r"^    unipelt train (.*)$", README, re.MULTILINE)
    assert len(commands) == 6
    for arguments in commands:
        words = dict(zip(arguments.split()[::2], arguments.split()[1::2], strict=True))
        layers = [("", read_preset(words["--preset"]))] if "--preset" in words else []
        given: Settings = {"data": {"k": int(words["--k"])}, "method": {}}
        if "--task" in words:
            given["data"]["task"] = words["--task"]
        else:
            given["data"] |= {"tasks": words["--tasks"], "dev_size": int(words["--dev-size"])}
        if "--method" in words:
            given["method"]["name"] = words["--method"]
        sets = [toml.parse_assignment(words["--set"])] if "--set" in words else []
        own = merge_settings([given, *sets])
        assert resolve([*layers, ("", own)]).data.k == int(words["--k"])


@pytest.mark.slow
def test_the_script_for_ci_runs(workplace: Path) -> None:
    (script,) = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    cheap = re.sub(r"^unipelt train .*?(?= >)", lambda match: match[0] + CHEAP, script, flags=re.M)
    assert cheap != script
    result = run_in(workplace, cheap)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_python_for_a_run_runs(workplace: Path) -> None:
    """On a run that the first command of the README left, or its like."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "load_run" in block]
    (named,) = set(re.findall(r"runs/[\w-]+", code))
    if not (workplace / named / "result.json").is_file():
        train = f"unipelt train --task demo --k 100 --overwrite --out {named}{CHEAP}"
        assert run_in(workplace, train).returncode == 0
    result = run_in(workplace, f"{sys.executable} -", stdin=code)
    assert result.returncode == 0, result.stderr


def test_indented_commands_are_understood() -> None:
    from typer.main import get_command

    from unipelt_cli.cli import app

    group: Any = get_command(app)
    found = re.findall(r"^ +unipelt (\S+) (.*)$", README, re.MULTILINE)
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "presets").glob("sweeps/*.toml")]
    found += re.findall(r"^# +unipelt (sweep|compare) (.*)$", "\n".join(files), re.MULTILINE)
    assert len(found) >= 22
    for name, arguments in found:
        group.commands[name].make_context(name, arguments.split())


def test_the_packaged_demo_is_what_it_says() -> None:
    folder = Path(unipelt_cli.__file__).parent / "data" / "demo"
    rows: list[tuple[str, str]] = []
    for name, count in (("train", 900), ("test", 300)):
        lines = (folder / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        assert lines[0] == "label\tsentence"
        assert len(lines) == count + 1
        rows += [tuple(line.split("\t")) for line in lines[1:]]
    labels = Counter(label for label, _ in rows)
    assert set(labels) == {"cancel", "change", "fault", "how_to", "refund", "status"}
    assert min(labels.values()) >= 150
    assert len({text.casefold() for _, text in rows}) == 1200
    openings = Counter(" ".join(text.casefold().split()[:3]) for _, text in rows)
    assert openings.most_common(1)[0][1] <= 12, "too many messages begin alike"
    lengths = sorted(len(text.split()) for _, text in rows)
    assert lengths[0] <= 5
    assert lengths[-1] >= 40


def test_the_table_of_methods_is_the_codes() -> None:
    assert with_methods(README) == README, "run: python tests/documentation/test_readme.py"


@pytest.mark.slow
def test_adding_a_method_takes_the_readmes_one_file(
    tmp_path: Path, rows_file: Path, backbone_dir: Callable[[str], Path]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "METHODS" in block]
    (tmp_path / "scale.py").write_text(code, encoding="utf-8")
    main = (
        "import sys; from unipelt_cli import methods; methods.__path__.append(sys.argv.pop(1));"
        "from unipelt_cli.cli import main; main()"
    )

    def unipelt(*arguments: object) -> dict[str, Any]:
        command = [sys.executable, "-c", main, tmp_path, *arguments, "--json"]
        result = subprocess.run(map(str, command), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return dict(json.loads(result.stdout))

    rows = (*rows_options(rows_file), "--k", 20)
    model = (
        "--model",
        backbone_dir("bert"),
        "--set",
        "train.epochs=2",
        "--set",
        "method.start=0.5",
    )
    run = tmp_path / "run"
    result = unipelt(
        *f"train --method scale --set train.epochs=2 --out {run}".split(), *rows, *model
    )
    assert (result["method"], result["stored_parameters"]) == ("scale", 2 * 32)
    assert unipelt("eval", run)["scores"] == result["test"]
    listed = {entry["name"]: entry for entry in unipelt("list", "methods")["methods"]}
    assert listed["scale"]["stored"] == 12 * 768


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_methods(README), encoding="utf-8")
