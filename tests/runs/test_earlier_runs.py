"""Runs of earlier versions, whose settings lack what has become a setting since."""

import json
from pathlib import Path

import pytest
from support.command import FAST, invoke, rows_options
from support.runs import reseal

from unipelt_cli.runs.names import ENVIRONMENT, EXPERIMENT, RESULT
from unipelt_cli.runs.run import read_experiment, read_run

EARLIER = {
    "hyperformer": {"generators": "per_block", "train_layer_norms": False},
    "adamix": {"stop_gradient": False},
    "adalora": {"penalty": "squared"},
}


def as_earlier(directory: Path, method: str) -> None:
    """Make a run one of the version that had no such settings."""
    path = directory / EXPERIMENT
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.split(" = ")[0] not in EARLIER[method]]
    assert len(lines) - len(kept) == len(EARLIER[method])
    path.write_text("".join(kept))
    reseal(directory)


@pytest.mark.parametrize("method", EARLIER)
def test_a_run_of_an_earlier_version_is_read_as_what_it_was(
    method: str, bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    rows = [*rows_options(rows_file), "--k", "24", "--model", bert]
    command = ["train", *rows, "--method", method, *FAST, "--out", out]
    settings = [
        part
        for key, value in EARLIER[method].items()
        for part in ("--set", f"method.{key}={json.dumps(value).strip(chr(34))}")
    ]
    code, stdout, stderr = invoke(*command, *settings, "--json")
    assert code == 0, stderr
    trained, written = json.loads(stdout), read_experiment(out)

    as_earlier(out, method)

    assert read_experiment(out) == written
    assert read_run(out).result["test"] == trained["test"]
    code, stdout, stderr = invoke("eval", out, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["scores"] == trained["test"]
    assert invoke("train", "--resume", *command[1:], *settings)[0] == 0
    assert invoke(*command, "--resume")[0] == 0  # what the command did not say is what it was
    code, _, stderr = invoke(*command, "--resume", "--set", "train.epochs=9")
    assert code == 2
    assert "holds another experiment, train.epochs" in stderr


@pytest.mark.parametrize(
    ("method", "scale"), [("unipelt-apl", 1.0), ("unipelt-aplb", 1.0), ("apl-ungated", 2.0)]
)
def test_an_unset_lora_scale_stays_the_papers_whatever_the_default_became(
    method: str, scale: float, bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    out, copy = tmp_path / "run", tmp_path / "copy"
    sizes = ("method.reduction=16", "method.rank=8", f"method.lora_scale={scale}")
    given = [part for size in sizes for part in ("--set", size)]
    rows = [*rows_options(rows_file), "--k", "24", "--model", bert]
    code, stdout, stderr = invoke(
        *("train", *rows, "--method", method, *FAST, *given, "--out", out, "--json")
    )
    assert code == 0, stderr
    trained, written = json.loads(stdout), read_experiment(out)

    path = out / EXPERIMENT
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("lora_scale")))
    reseal(out)

    assert read_experiment(out) == written
    code, stdout, stderr = invoke("eval", out, "--json")
    assert (code, json.loads(stdout)["scores"]) == (0, trained["test"]), stderr
    assert invoke("verify", out)[0] == 0
    assert invoke("reproduce", out, "--out", copy)[0] == 0
    assert read_experiment(copy) == written


def test_an_unset_lora_scale_is_that_of_the_gates_that_the_run_had(tmp_path: Path) -> None:
    settings = '[data]\ntask = "sst2"\n\n[method]\nname = "unipelt-apl"\ngated = false\n'
    (tmp_path / EXPERIMENT).write_text(settings)
    assert read_experiment(tmp_path).settings()["method"]["lora_scale"] == 2.0


def test_an_interrupted_run_of_an_earlier_version_goes_on_with_the_label_it_scored(
    bert: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    lines = [f"the film was {'awful' if n % 4 == 0 else 'good'} {n}" for n in range(60)]
    labelled = [f"{line},{'no' if 'awful' in line else 'yes'}" for line in lines]
    rows.write_text("\n".join(["text,label", *labelled]) + "\n")
    out = tmp_path / "run"
    command = ["train", *rows_options(rows), "--k", "24", "--model", bert, *FAST, "--out", out]
    code, stdout, stderr = invoke(*command, "--json")
    assert (code, json.loads(stdout)["positive"]) == (0, "no"), stderr

    environment = json.loads((out / ENVIRONMENT).read_text())
    del environment["data"]["positive"]
    environment["data"]["notes"] = ["what was said then"]
    (out / ENVIRONMENT).write_text(json.dumps(environment))
    text = (out / EXPERIMENT).read_text()
    kept = [line for line in text.splitlines() if not line.startswith(("kind = ", "label_scale"))]
    (out / EXPERIMENT).write_text("\n".join(kept) + "\n")
    (out / RESULT).unlink()

    code, stdout, stderr = invoke(*command, "--resume", "--json")
    assert (code, json.loads(stdout)["positive"]) == (0, "yes"), stderr


@pytest.mark.parametrize(
    "setting", ["method.gate_rate=1.0", "train.head_end=trained", "train.rows_per_class=1"]
)
def test_only_what_a_run_could_not_say_is_excused(
    setting: str, bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    rows = [*rows_options(rows_file), "--k", "24", "--model", bert]
    command = ["train", *rows, *FAST, "--out", out]
    assert invoke(*command, "--set", setting)[0] == 0
    key = setting.partition("=")[0]
    code, _, stderr = invoke(*command, "--resume")  # said then, and another default now
    assert code == 2
    assert f"{out}: holds another experiment, {key} = " in stderr
    path = out / EXPERIMENT
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line.split(" = ")[0] != key[6:].strip(".")))
    reseal(out)
    assert invoke(*command, "--resume")[0] == 0  # it could not have said so
    assert invoke(*command, "--resume", "--set", "train.clip=9")[0] == 2
