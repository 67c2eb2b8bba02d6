"""Several tasks train one model: their rows, heads, batches, adapters and gates."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command import invoke
from support.models import by_the_hooks, disturbed, experiment, logits_of
from support.rows import SENTENCES, task_sentence, write_rows
from torch import Tensor, nn

from unipelt_cli import methods
from unipelt_cli.backbones.pretrained import BERT_BASE
from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.config.presets import read_preset
from unipelt_cli.config.sections import DataSettings
from unipelt_cli.config.toml import dump
from unipelt_cli.data.preparation import prepare, prepare_each
from unipelt_cli.data.prepared_directory import save_prepared
from unipelt_cli.errors import ConfigError, DataError
from unipelt_cli.files import sealed
from unipelt_cli.gates.report import inspect_gates
from unipelt_cli.methods.unipelt.inspection import record_gates
from unipelt_cli.models.batches import interleaved, shuffled
from unipelt_cli.models.build import build, count
from unipelt_cli.models.evaluation import compute_logits, encode_rows
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.names import EXPERIMENT, MODEL, PROBE, STATE
from unipelt_cli.runs.run import Run, read_run
from unipelt_cli.tasks import get_task, joint_metric, joint_name, joint_scores
from unipelt_cli.training import execution
from unipelt_cli.training.events import Epoch, Finished, Step, TaskRows
from unipelt_cli.training.loop import Training
from unipelt_cli.training.planning import with_drawn_rows
from unipelt_cli.training.step import train_losses

FAST = {"device": "cpu", "precision": "fp32", "epochs": 2, "batch_size": 8, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return made-up sst2, cola and stsb in GLUE's layout: 60 train rows and 20 dev rows each."""
    root = tmp_path_factory.mktemp("glue")
    for split, rows in (("train", range(60)), ("dev", range(60, 80))):
        lines = {
            "SST-2": ["sentence\tlabel"],
            "CoLA": [],
            "STS-B": ["sentence1\tsentence2\tscore"],
        }
        for row in rows:
            said, label = (("good", 1), ("awful", 0))[row % 2]
            lines["SST-2"].append(f"{task_sentence(row, said)}\t{label}")
            lines["CoLA"].append(
                f"x\t{row % 3 % 2}\t\t{task_sentence(row, ('cat', 'dog', 'ran')[row % 3])}"
            )
            pair = f"{task_sentence(row, said)}\t{task_sentence(row, 'good')}"
            lines["STS-B"].append(f"{pair}\t{4 * label + row % 5 / 10}")
        for folder, written in lines.items():
            (root / folder).mkdir(exist_ok=True)
            (root / folder / f"{split}.tsv").write_text("\n".join(written) + "\n")
    return root


def two_tasks(glue: Path, backbone: Path, method: str, *tasks: str, **train: Any) -> Experiment:
    settings = {
        "data": {"tasks": tasks or ("sst2", "stsb"), "k": 24, "dev_size": 12, "source": str(glue)},
        "model": {"backbone": str(backbone), "pooling": "mean"},
        "method": {"name": method},
        "train": FAST | train,
    }
    return resolve([("", settings)])


def finish(settings: Experiment, directory: Path) -> Run:
    *_, last = execution.execute(settings, directory)
    assert isinstance(last, Finished)
    return read_run(directory)


@pytest.fixture(scope="module")
def finished(glue: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Train both methods on sst2 and stsb: two labels, and a number."""
    root = tmp_path_factory.mktemp("runs")
    names = ("hyperformer", "unipelt-multi")
    return {name: finish(two_tasks(glue, bert, name), root / name) for name in names}


# The experiment and its rows


def test_each_tasks_rows_are_those_it_has_alone(glue: Path) -> None:
    shared = {"k": 10, "data_seed": 222, "dev_size": 7, "source": str(glue)}
    together = prepare_each(DataSettings(tasks=("sst2", "stsb", "cola"), **shared))
    for name, found in zip(("sst2", "stsb", "cola"), together, strict=True):
        alone = prepare(DataSettings(task=name, **shared))
        assert found.task == alone.task
        assert found.manifest == alone.manifest
        for split in ("train", "dev", "test"):
            assert found.splits[split][:] == alone.splits[split][:]


def test_an_experiment_on_several_tasks_survives_its_file(glue: Path, tmp_path: Path) -> None:
    settings = two_tasks(glue, Path("minilm"), "hyperformer", "sst2", "cola")
    assert settings.data.tasks == ("sst2", "cola")
    path = tmp_path / "experiment.toml"
    path.write_text(dump(settings))
    assert 'tasks = ["sst2", "cola"]' in path.read_text()
    assert resolve([("", read_preset(str(path)))]) == settings
    assert resolve([("", {"data": {"tasks": " sst2, cola", "dev_size": 5}})]).data.tasks == (
        "sst2",
        "cola",
    )


def test_one_tasks_experiment_says_nothing_of_several() -> None:
    assert "tasks" not in dump(resolve([("", {"data": {"task": "sst2"}})]))


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        (
            {"tasks": "sst2,mrcp"},
            "data.tasks has 'mrcp': no such task",
            "did you mean mrpc? otherwise choose one of",
        ),
        (
            {"tasks": "sst2,sst2"},
            "data.tasks = ['sst2', 'sst2']: one is named twice",
            "name each once",
        ),
        (
            {"tasks": "sst2"},
            "data.tasks = ['sst2']: not several",
            "give --tasks A,B, or one as --task",
        ),
        (
            {"tasks": "sst2,cola", "task": "sst2"},
            "data.task = 'sst2': one task's, but there are several",
            "drop it, or drop --tasks; own rows: `unipelt prepare` each, then --prepared A,B",
        ),
        (
            {"tasks": "sst2,cola", "train_file": "a.csv"},
            "data.train_file = 'a.csv': one task's, but there are several",
            "drop it, or drop --tasks; own rows: `unipelt prepare` each, then --prepared A,B",
        ),
        (
            {"tasks": "demo,sst2"},
            "data.dev_size is not set, and the tasks' own differ: demo 200, sst2 1000",
            "give --dev-size N",
        ),
        ({"prepared": ["a", "b"], "source": "x"}, "data.source = 'x': the rows", "drop --source"),
        (
            {"prepared": ["a", "b"], "tasks": "sst2,cola,rte"},
            "data.prepared = ['a', 'b']: not one directory for each of ['sst2', 'cola', 'rte']",
            "drop --tasks: the directories know their tasks",
        ),
        ({"tasks": 3}, "data.tasks = 3 is not allowed", "give a valid tuple"),
    ],
)
def test_contradictions_between_tasks_are_refused(
    settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([("", {"data": settings})])
    assert caught.value.message.startswith(message)
    assert caught.value.hint.startswith(hint)


def prepared(root: Path, glue: Path, name: str, **settings: Any) -> str:
    values = {"task": name, "k": 10, "dev_size": 5, "source": str(glue)} | settings
    save_prepared(prepare(DataSettings(**values)), root / name)
    return str(root / name)


def test_prepared_directories_say_which_tasks_they_hold(glue: Path, tmp_path: Path) -> None:
    places = (prepared(tmp_path, glue, "sst2"), prepared(tmp_path, glue, "cola"))
    settings = with_drawn_rows(resolve([("", {"data": {"prepared": places}})]))
    assert settings.data.tasks == ("sst2", "cola")
    assert (settings.data.k, settings.data.dev_size) == (10, 5)
    found = prepare_each(settings.data)
    assert [own.task.name for own in found] == ["sst2", "cola"]
    assert with_drawn_rows(settings) == settings


def test_tasks_that_were_drawn_otherwise_or_are_called_alike_are_refused(
    glue: Path, tmp_path: Path
) -> None:
    first = prepared(tmp_path, glue, "sst2")
    with pytest.raises(DataError, match=r"data.k: sst2 was drawn with 10, cola with 12"):
        prepare_each(DataSettings(prepared=(first, prepared(tmp_path, glue, "cola", k=12))))
    again = prepared(tmp_path / "again", glue, "sst2", data_seed=222)
    with pytest.raises(DataError, match="two of the tasks are called 'sst2'"):
        prepare_each(DataSettings(prepared=(first, again)))
    squares = prepared(tmp_path, glue, "stsb", metric="mse")
    with pytest.raises(DataError, match="the metric of stsb is 'mse', which no mean can hold"):
        prepare_each(DataSettings(prepared=(first, squares)))


def test_scores_of_several_tasks_are_their_mean_and_each() -> None:
    tasks = [get_task("sst2"), get_task("cola")]
    assert (joint_name(tasks), joint_metric(tasks)) == ("sst2+cola", "mean")
    scores = [{"accuracy": 0.75}, {"matthews": 0.25, "accuracy": 0.5}]
    assert joint_scores(tasks, scores) == {
        "mean": 0.5,
        "sst2.accuracy": 0.75,
        "cola.matthews": 0.25,
        "cola.accuracy": 0.5,
    }
    assert (joint_name(tasks[:1]), joint_metric(tasks[:1])) == ("sst2", "accuracy")
    assert joint_scores(tasks[:1], scores[:1]) == {"accuracy": 0.75}


# The loop


def test_an_epoch_holds_every_row_of_every_task_once_in_batches_of_one_task() -> None:
    random = np.random.default_rng(0)
    lengths = [random.integers(3, 60, size) for size in (50, 23, 100)]
    batches = interleaved(lengths, 16, seed=42, epoch=1)
    for task, own in enumerate(lengths):
        rows = np.concatenate([chosen for place, chosen in batches if place == task])
        assert sorted(rows.tolist()) == list(range(len(own)))
    turns = [place for place, _ in batches]
    assert turns != sorted(turns), "the tasks come one after the other"
    again = interleaved(lengths, 16, seed=42, epoch=1)
    assert all(a[0] == b[0] and (a[1] == b[1]).all() for a, b in zip(batches, again, strict=True))
    assert turns != [place for place, _ in interleaved(lengths, 16, seed=42, epoch=2)]
    assert turns != [place for place, _ in interleaved(lengths, 16, seed=43, epoch=1)]


def test_one_task_alone_has_the_batches_it_always_had() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 103)
    batches = interleaved([lengths], 16, seed=42, epoch=3)
    expected = shuffled(lengths, 16, seed=42, epoch=3)
    assert [place for place, _ in batches] == [0] * 7
    assert all((own == other).all() for (_, own), other in zip(batches, expected, strict=True))
    first = [42, 27, 41, 5]
    assert expected[0].tolist()[: len(first)] == first, "recorded before there were tasks"


def training(bert: Path, method: str, **train: Any) -> Training:
    """Return a loop on two tasks of unlike sizes: two labels, and a number."""
    settings = experiment(bert, method, train={"batch_size": 4, "epochs": 1, **train})
    tuned = disturbed(build(settings, [2, 1]))
    texts = [task_sentence(row, ("good", "awful")[row % 2]) for row in range(20)]
    rows = encode_rows(tuned, [texts], 128)
    few = encode_rows(tuned, [texts[:8], texts[8:16]], 128)
    labels, values = np.arange(20) % 2, np.linspace(0, 5, 8)
    more = [TaskRows(get_task("stsb"), (few, values), (few, values))]
    first = get_task("sst2")
    return Training(tuned, first, (rows, labels), (rows, labels), settings.train, more)


@pytest.mark.parametrize("method", ["hyperformer", "unipelt-multi", "lora", "full", "head"])
def test_a_step_moves_its_own_tasks_head_and_tensors_only(bert: Path, method: str) -> None:
    loop = training(bert, method, weight_decay=0.1, learning_rate=1e-2)
    assert loop.steps == 5 + 2
    classifier = loop.tuned.classifier
    own: dict[int, list[nn.Parameter]] = {0: [], 1: []}
    for name, parameter in classifier.named_parameters():
        if name.startswith("head.") or "tasks.0" in name or "task_gates.0" in name:
            own[0].append(parameter)
        elif name.startswith("other_heads.0.") or "tasks.1" in name or "task_gates.1" in name:
            own[1].append(parameter)
    before = {place: [p.detach().clone() for p in members] for place, members in own.items()}
    seen = set()
    for event in loop.events():
        if not isinstance(event, Step):
            continue
        place = classifier.task
        seen.add(place)
        for task, members in own.items():
            moved = [not torch.equal(p, old) for p, old in zip(members, before[task], strict=True)]
            assert all(moved) if task == place else not any(moved)
            before[task] = [p.detach().clone() for p in members]
    assert seen == {0, 1}


def test_the_loss_of_an_epoch_is_the_mean_over_all_rows(bert: Path) -> None:
    loop = training(bert, "hyperformer")
    sizes = [
        len(rows) for _, rows in interleaved([r.train[0].lengths for r in loop.courses], 4, 42, 1)
    ]
    events = list(loop.events())
    losses = [event.loss for event in events if isinstance(event, Step)]
    (epoch,) = (event for event in events if isinstance(event, Epoch))
    assert epoch.train_loss == pytest.approx(np.average(losses, weights=sizes))
    assert list(epoch.dev) == ["mean", "sst2.accuracy", "stsb.spearman", "stsb.pearson", "stsb.mse"]
    expected = (epoch.dev["sst2.accuracy"] + epoch.dev["stsb.spearman"]) / 2
    assert epoch.dev["mean"] == pytest.approx(expected)
    assert loop.progress.best_score == epoch.dev["mean"]


def test_a_look_at_the_data_sees_the_rows_of_every_task(bert: Path) -> None:
    loop = training(bert, "lora")
    tasks = []
    losses = []
    for loss in train_losses(loop.tuned, loop.courses, 42, 8):
        tasks.append(loop.tuned.classifier.task)
        losses.append(float(loss.detach()))
    assert tasks == [0, 0, 0, 1]
    assert len(list(train_losses(loop.tuned, loop.courses, 42, 4, 8))) == 2, (
        "an equal share of eight rows: four of each"
    )
    logits = compute_logits(loop.tuned, loop.courses[1].dev[0], 1)
    assert losses[3] == pytest.approx(((logits[:, 0] - loop.courses[1].dev[1]) ** 2).mean(), 1e-4)


@pytest.mark.parametrize("method", ["hyperformer", "unipelt-multi"])
@pytest.mark.parametrize("stop_after", [3, 7, 8])
def test_an_interrupted_run_on_two_tasks_goes_on_bit_for_bit(
    glue: Path,
    bert: Path,
    finished: dict[str, Run],
    tmp_path: Path,
    method: str,
    stop_after: int,
) -> None:
    settings = two_tasks(glue, bert, method)
    events = execution.execute(settings, tmp_path / "run")
    for _ in range(stop_after):
        next(events)
    events.close()
    assert (tmp_path / "run" / STATE).is_file()
    *_, last = execution.execute(settings, tmp_path / "run", "resume")
    assert isinstance(last, Finished)
    whole = finished[method]
    for name in (MODEL, PROBE, EXPERIMENT):
        assert (tmp_path / "run" / name).read_bytes() == (whole.directory / name).read_bytes()
    assert (last.result["dev"], last.result["test"]) == (whole.result["dev"], whole.result["test"])


@pytest.mark.parametrize("method", ["lora", "prefix", "head"])
def test_a_method_that_ignores_tasks_shares_all_but_the_head(
    glue: Path, bert: Path, tmp_path: Path, method: str
) -> None:
    run = finish(two_tasks(glue, bert, method, "cola", "stsb", epochs=1), tmp_path / "run")
    counts = count(methods.get(method).method, run.build().pretrained, 0)
    result = run.result
    assert (result["trainable_parameters"], result["stored_parameters"]) == counts
    assert result["head_parameters"] == 33 * 2 + 33


@pytest.mark.parametrize("method", sorted(methods.table()))
def test_every_method_trains_on_two_tasks_and_reloads(bert: Path, method: str) -> None:
    loop = training(bert, method)
    epochs = [event for event in loop.events() if isinstance(event, Epoch)]
    assert all(np.isfinite(epoch.train_loss) for epoch in epochs)
    settings = experiment(bert, method, train={"batch_size": 4, "epochs": 1})
    fresh = build(settings, [2, 1], folded=True)
    fresh.load(loop.tuned.stored())
    for place, course in enumerate(loop.courses):
        logits = compute_logits(fresh, course.dev[0], place)
        assert (logits == compute_logits(loop.tuned, course.dev[0], place)).all()


# UniPELT whose gates see the task


def gates_of(tuned: TunedModel, task: int) -> list[dict[str, Tensor]]:
    tuned.classifier.select(task)
    with record_gates(tuned.classifier.backbone) as recorded:
        logits_of(tuned, SENTENCES)
        return [dict(layer) for layer in recorded]


def task_terms(tuned: TunedModel) -> Iterator[nn.Parameter]:
    for name, parameter in tuned.classifier.named_parameters():
        if ".task_gates." in name:
            yield parameter


def test_without_task_terms_the_gates_are_the_plain_ones(bert: Path) -> None:
    sizes = {"reduction": 16, "rank": 8, "lora_scale": 1.0}
    plain = experiment(bert, "unipelt-apl", options=sizes, model={"normalise": False})
    plain = by_the_hooks(build(plain, 2))
    multi = build(experiment(bert, "unipelt-multi"), [2, 2])
    assert all(not term.any() for term in task_terms(multi))
    assert torch.equal(logits_of(plain, SENTENCES), logits_of(multi, SENTENCES))
    for task in range(2):
        for own, other in zip(gates_of(plain, 0), gates_of(multi, task), strict=True):
            assert own.keys() == other.keys() == {"adapter", "prefix", "lora"}
            assert all(torch.equal(own[name], other[name]) for name in own)
    disturbed(multi)
    trained = gates_of(multi, 0)
    assert not torch.equal(trained[0]["lora"], gates_of(multi, 1)[0]["lora"])
    with torch.no_grad():
        for term in task_terms(multi):
            term.zero_()
    assert torch.equal(gates_of(multi, 0)[1]["prefix"], gates_of(multi, 1)[1]["prefix"])
    assert not torch.equal(gates_of(multi, 0)[1]["prefix"], trained[1]["prefix"])


def test_gates_that_see_the_task_cannot_be_left_out() -> None:
    with pytest.raises(ConfigError, match=r"method.gated = False: there is no gate to see"):
        experiment(Path("minilm"), "unipelt-multi", options={"gated": False})


def test_a_tasks_gate_is_the_shared_one_plus_its_own_term(bert: Path) -> None:
    tuned = disturbed(build(experiment(bert, "unipelt-multi"), [2, 1]))
    backbone = tuned.classifier.backbone
    rows = encode_rows(tuned, [SENTENCES[1:2]], 128).batch([0], tuned.device)
    state = tuned.classifier.state_dict()
    for task in range(2):
        tuned.classifier.select(task)
        with torch.no_grad():
            hidden = backbone(**rows, output_hidden_states=True).hidden_states[1]
        own = "backbone.submodules.layers.1"
        gate, term = f"{own}.gates.lora", f"{own}.task_gates.{task}.lora"
        weight = state[f"{gate}.weight"] + state[f"{term}.weight"]
        bias = state[f"{gate}.bias"] + state[f"{term}.bias"]
        expected = (hidden @ weight.T + bias).sigmoid().mean()
        assert float(gates_of(tuned, task)[1]["lora"][1]) == pytest.approx(float(expected), 1e-5)


def test_counts_are_unipelts_and_a_gate_set_for_each_task() -> None:
    method, gates = methods.get("unipelt-multi").method, 3 * 9_228
    assert count(method, BERT_BASE, 1538, 2) == (11_074_148 + 2 * gates, 1_401_444 + 2 * gates)


def test_after_training_gates_differ_by_task_for_the_same_rows(
    finished: dict[str, Run],
) -> None:
    run = finished["unipelt-multi"]
    tuned = run.build()
    for layer in range(2):
        first, second = gates_of(tuned, 0)[layer], gates_of(tuned, 1)[layer]
        assert all((first[name] - second[name]).abs().max() > 1e-3 for name in first)
    rows = run.rows("test", task_index=1)
    assert rows.column_names == ["sentence1", "sentence2", "label", "row"]
    report = inspect_gates(run, tuned, rows, 1)
    assert report.by_class()[0].name.startswith("below ")
    assert inspect_gates(run, tuned, run.rows("test"), 0).labels == ("negative", "positive")


# The run directory and the commands


@pytest.mark.parametrize("method", ["hyperformer", "unipelt-multi"])
def test_a_run_directory_holds_all_tasks(finished: dict[str, Run], method: str) -> None:
    run = finished[method]
    result = run.result
    assert (result["task"], result["metric"], result["k"]) == ("sst2+stsb", "mean", 24)
    names = ["mean", "sst2.accuracy", "stsb.spearman", "stsb.pearson", "stsb.mse"]
    assert list(result["dev"]) == list(result["test"]) == names
    mean = (result["test"]["sst2.accuracy"] + result["test"]["stsb.spearman"]) / 2
    assert result["test"]["mean"] == pytest.approx(mean)
    assert run.environment["data"]["tasks"].keys() == {"sst2", "stsb"}
    assert [replace(get_task(task.name), source=None) for task in run.tasks] == list(run.tasks)
    assert result["head_parameters"] == 33 * 2 + 33
    stored, _ = sealed.open_tensors(run.directory / PROBE)
    assert stored["logits"].shape == (64, 3)


def test_a_fresh_process_gives_a_joint_run_the_same_logits_to_the_bit(
    finished: dict[str, Run],
) -> None:
    code = (
        "import json, sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from unipelt_cli.runs.probe import probe\n"
        "from unipelt_cli.runs.run import read_run\n"
        "print(json.dumps([probe(read_run(Path(p)).build()).tobytes().hex()"
        " for p in sys.argv[1:]]))"
    )
    paths = [run.directory for run in finished.values()]
    arguments = [sys.executable, "-c", code, *map(str, paths)]
    found = json.loads(subprocess.run(arguments, capture_output=True, check=True).stdout)
    for path, said in zip(paths, found, strict=True):
        stored, _ = sealed.open_tensors(path / PROBE)
        assert stored["logits"].numpy().tobytes().hex() == said


def answer(*arguments: str | Path) -> dict[str, Any]:
    code, stdout, stderr = invoke(*arguments, "--json")
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


def test_train_and_eval_take_several_tasks(glue: Path, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = [
        "--model",
        bert,
        "--device",
        "cpu",
        "--set",
        "train.epochs=1",
        "--precision",
        "fp32",
    ]
    drawn = ["--k", "16", "--dev-size", "8"]
    command = ["train", "--tasks", "sst2,cola", "--source", glue, "--method", "hyperformer"]
    code, stdout, stderr = invoke(*command, *drawn, *settings, "--out", out, "--json")
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["task"] == "sst2+cola"
    assert "dev mean" in stderr
    scored = answer("eval", out)
    assert scored == {"split": "test", "rows": 40, "scores": result["test"]}
    one = answer("eval", out, "--task", "cola", "--split", "dev")
    assert one == {
        "split": "dev",
        "rows": 8,
        "scores": {name: result["dev"][f"cola.{name}"] for name in ("matthews", "accuracy")},
    }
    places = ",".join(prepared(tmp_path, glue, name, k=16, dev_size=8) for name in ("sst2", "cola"))
    again = answer(
        "train", "--prepared", places, "--method", "hyperformer", *settings, "--out", tmp_path / "b"
    )
    assert (again["task"], again["k"], again["test"]) == ("sst2+cola", 16, result["test"])
    assert answer("eval", tmp_path / "b")["scores"] == result["test"]
    assert answer("train", "--preset", out / "experiment.toml", "--out", out, "--resume") == result
    looked = answer(*command, *drawn, *settings, "--dry-run")
    assert looked["rows"] == {
        name: {"train": 16, "dev": 8, "test": 20} for name in ("sst2", "cola")
    }


def test_rows_are_labelled_by_the_task_that_is_named(
    finished: dict[str, Run], tmp_path: Path
) -> None:
    run = finished["hyperformer"]
    code, stdout, _ = invoke(
        "predict", run.directory, "-", "--task", "sst2", stdin="the film was good\n"
    )
    assert code == 0
    assert json.loads(stdout)["probabilities"].keys() == {"negative", "positive"}
    code, stdout, _ = invoke("predict", run.directory, "-", "--task", "stsb", stdin="good\tbad\n")
    assert code == 0
    tuned = run.build()
    rows = encode_rows(tuned, [["good"], ["bad"]], 128)
    assert json.loads(stdout) == {"value": float(compute_logits(tuned, rows, 1)[0, 0])}
    file = tmp_path / "rows.csv"
    file.write_text("sentence1,sentence2,label\ngood,bad,1.5\nfine,fine,4.5\n")
    scored = answer("eval", run.directory, "--file", file, "--task", "stsb")
    assert (scored["rows"], list(scored["scores"])) == (2, ["spearman", "pearson", "mse"])


def test_gates_are_inspected_by_task(finished: dict[str, Run]) -> None:
    directory = finished["unipelt-multi"].directory
    found = [answer("inspect-gates", directory, "--task", name) for name in ("sst2", "stsb")]
    assert [one["rows"] for one in found] == [20, 20]
    assert found[0]["layers"] != found[1]["layers"]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["predict", "{run}", "-"],
            "{run}: trained on several tasks (sst2, stsb)",
            "say which one with --task NAME",
        ),
        (
            ["inspect-gates", "{run}"],
            "{run}: trained on several tasks (sst2, stsb)",
            "say which one with --task NAME",
        ),
        (
            ["eval", "{run}", "--file", "rows.csv"],
            "{run}: trained on several tasks (sst2, stsb)",
            "say which one with --task NAME",
        ),
        (
            ["eval", "{run}", "--task", "stbs"],
            "--task 'stbs': {run} was not trained on it",
            "did you mean stsb? otherwise choose one of sst2, stsb",
        ),
        (
            ["predict", "{run}", "-", "--task", "rte"],
            "--task 'rte': {run} was not trained on it",
            "choose one of sst2, stsb",
        ),
        (
            ["export", "{run}", "--to", "hf"],
            "{run}: trained on several tasks, and no other format holds their heads",
            "train one task alone, with --task, and export that run",
        ),
        (
            ["prepare", "--set", "data.tasks=sst2,cola", "--offline", "--source", "here"],
            "`prepare` draws one task's rows",
            "run it for each task, with --task",
        ),
    ],
)
def test_a_missing_or_unknown_task_is_said_in_two_lines(
    finished: dict[str, Run], arguments: list[str], message: str, hint: str
) -> None:
    run = str(finished["unipelt-multi"].directory)
    code, stdout, stderr = invoke(*(argument.format(run=run) for argument in arguments))
    assert (code, stdout) == (2, "")
    assert stderr.splitlines() == [f"error: {message.format(run=run)}", f"hint: {hint}"]


def test_a_run_on_one_task_takes_its_own_name_and_no_other(bert: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv", 40)
    own = {"task": "own", "folds": 0, "train_file": str(rows), "text": "text", "label": "label"}
    settings = experiment(bert, "unipelt-multi", data=own, train={"epochs": 1})
    run = finish(settings, tmp_path / "run")
    assert "task" in run.header
    assert "tasks" not in run.header
    scores = answer("eval", run.directory, "--task", "own")
    assert scores["scores"] == run.result["test"]
    code, _, stderr = invoke("eval", run.directory, "--task", "sst2")
    assert code == 2
    assert "--task 'sst2'" in stderr
    code, _, stderr = invoke("export", run.directory, "--to", "adapters")
    assert code == 2
    assert "its gates see the task, and adapters has no such gates" in stderr
