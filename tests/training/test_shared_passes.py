"""Runs in one pass are what they are alone, and stop, fail and go on alone."""

import gc
import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import experiment
from support.rows import write_rows

from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.errors import CheckError, RunError
from unipelt_cli.files import sealed
from unipelt_cli.models import sharing
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.runs import run
from unipelt_cli.runs.names import RESULT
from unipelt_cli.runs.writer import Writer
from unipelt_cli.tasks import get_task
from unipelt_cli.training import execution, planning, session, shared_passes
from unipelt_cli.training.events import Failed, Finished, Ready, Step
from unipelt_cli.training.loop import Training
from unipelt_cli.training.step import Stepper

FILES = ("model.safetensors", "probe.safetensors")


def loop_of(backbone: Path, seed: int, count: int, **train: Any) -> Training:
    """Make a loop on rows of its own, of other lengths and another number than the others'."""
    random = np.random.default_rng(seed)
    words = ["good", "bad", "film", "red", "the", "very", "cat", "dog"]
    rows = [" ".join(random.choice(words, random.integers(2, 14))) for _ in range(count)]
    options = {"epochs": 20, "batch_size": 6, "patience": 20, "learning_rate": 1e-2, **train}
    settings = experiment(backbone, "unipelt-apl", train={"seed": seed, **options})
    tuned = build(settings, 2)
    encoded = encode_rows(tuned, [rows], 128)
    labels = np.arange(count) % 2
    labelled = (encoded, labels)
    return Training(tuned, get_task("sst2"), labelled, labelled, settings.train)


def steps_of(loops: dict[int, Training], count: int) -> dict[int, list[float]]:
    """Take steps together until every loop has taken so many; return their losses."""
    losses: dict[int, list[float]] = {name: [] for name in loops}
    for name, event in shared_passes.train_together(loops):
        if isinstance(event, Step) and len(losses[name]) < count:
            losses[name].append(event.loss)
        if all(len(own) == count for own in losses.values()):
            break
    return losses


@pytest.mark.parametrize("device_rows", ["ragged", "padded"])
def test_twenty_steps_together_are_those_that_each_takes_alone(
    backbone_dir: Callable[[str], Path], device_rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device_rows == "padded":  # as on a GPU: one part, every run with as many rows and tokens
        as_on_a_gpu(monkeypatch)
    sizes = {0: 17, 1: 20, 2: 9}
    rate = 1e-3  # 1e-2 for the head: at ten times that a rounding grows past the bound by itself
    alone, loops = {}, {}
    for name, count in sizes.items():
        loop = loop_of(backbone_dir("bert"), name, count, learning_rate=rate)
        events = loop.events()
        alone[name] = (loop, [])
        while len(alone[name][1]) < 20:
            if isinstance(event := next(events), Step):
                alone[name][1].append(event.loss)
        loops[name] = loop_of(backbone_dir("bert"), name, count, learning_rate=rate)
        if name:
            sharing.share(loops[0].tuned, loops[name].tuned)
    losses = steps_of(loops, 20)
    for name, (loop, expected) in alone.items():
        assert losses[name] == pytest.approx(expected, abs=1e-5)
        for key, parameter in loop.parameters.items():
            found = loops[name].parameters[key]
            assert (found - parameter).abs().max() < 1e-5, (name, key)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from unipelt_cli.methods.unipelt.fused import batching

    monkeypatch.setattr(batching, "shares_out", lambda device: False)
    monkeypatch.setattr(shared_passes, "shares_out", lambda device: False)


def test_a_shared_backbone_is_held_once(backbone_dir: Callable[[str], Path]) -> None:
    first, other = (loop_of(backbone_dir("bert"), seed, 8).tuned for seed in (1, 2))
    assert sharing.can_share(first)
    sharing.share(first, other)
    own, lent = (dict(one.classifier.backbone.named_parameters()) for one in (first, other))
    for name, parameter in own.items():
        same = parameter.data_ptr() == lent[name].data_ptr()
        assert same == (not parameter.requires_grad), name


def test_methods_that_train_the_backbone_itself_share_nothing(
    backbone_dir: Callable[[str], Path],
) -> None:
    for method in ("full", "bitfit", "houlsby", "unipelt-aplb"):
        assert not sharing.can_share(build(experiment(backbone_dir("bert"), method), 2)), method


def experiments(backbone: Path, rows: Path, method: str = "unipelt-apl") -> list[Experiment]:
    data = {"train_file": str(rows), "text": "text", "label": "label", "k": 24, "dev_size": 12}
    return [
        resolve(
            [
                (
                    "",
                    {
                        "data": {**data, "data_seed": seed},
                        "model": {"backbone": str(backbone)},
                        "method": {"name": method},
                        "train": {
                            "device": "cpu",
                            "precision": "fp32",
                            "epochs": 6,
                            "patience": 2,
                            "batch_size": 8,
                            "learning_rate": 1e-2,
                        },
                    },
                )
            ]
        )
        for seed in (111, 222, 333)
    ]


def finish(events: Any) -> dict[int, Any]:
    return {place: event for place, event in events if isinstance(event, Finished | Failed)}


def close_to(found: Path, expected: Path) -> None:
    """Compare two run directories: same scores, same numbers but for rounding."""
    results = [json.loads((path / RESULT).read_text()) for path in (found, expected)]
    for key in ("dev", "test", "best_epoch", "epochs", "data_seed", "stored_parameters"):
        assert results[0][key] == pytest.approx(results[1][key]), key
    for name in FILES:
        own, other = (sealed.open_tensors(path / name)[0] for path in (found, expected))
        assert own.keys() == other.keys()
        for key, tensor in own.items():
            assert (tensor - other[key]).abs().max() < 1e-4, (name, key)


@pytest.mark.parametrize("method", ["unipelt-apl", "bitfit"])
def test_run_directories_are_those_of_runs_alone(
    backbone_dir: Callable[[str], Path], rows_file: Path, tmp_path: Path, method: str
) -> None:
    each = experiments(backbone_dir("bert"), rows_file, method)
    directories = [tmp_path / f"together-{place}" for place in range(3)]
    finished = finish(execution.execute_together(each, directories))
    assert sorted(finished) == [0, 1, 2]
    for place, own in enumerate(each):
        alone = tmp_path / f"alone-{place}"
        list(execution.execute(own, alone))
        close_to(directories[place], alone)
        assert run.read_run(directories[place]).build().precision == "fp32"


def test_stopped_runs_go_on_together_as_if_nothing_had_happened(
    backbone_dir: Callable[[str], Path], rows_file: Path, tmp_path: Path
) -> None:
    each = experiments(backbone_dir("bert"), rows_file)
    whole, stopped = ([tmp_path / f"{name}-{i}" for i in range(3)] for name in ("whole", "stopped"))
    list(execution.execute_together(each, whole))
    events = execution.execute_together(each, stopped)
    seen = 0
    while seen < 7:  # in the middle of a step that all took
        seen += isinstance(next(events)[1], Step)
    events.close()
    for directory in stopped:
        with pytest.raises(RunError, match="unfinished"):
            run.read_run(directory)
    assert sorted(finish(execution.execute_together(each, stopped, "resume"))) == [0, 1, 2]
    for found, expected in zip(stopped, whole, strict=True):
        close_to(found, expected)
    again = finish(execution.execute_together(each, stopped, "resume"))
    assert sorted(again) == [0, 1, 2], "finished runs are returned"


def test_a_run_that_fails_does_not_stop_the_others(
    backbone_dir: Callable[[str], Path],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    close, make = Stepper.close, planning.loop_of
    made: list[Training] = []

    def making(*given: Any) -> Training:
        made.append(make(*given))
        return made[-1]

    def failing(self: Stepper, loss: torch.Tensor, moment: Any) -> float:
        if self is made[1].stepper and self.progress.taken == 4:
            raise CheckError("the loss is nan at step 5", "lower it")
        return close(self, loss, moment)

    monkeypatch.setattr(session, "loop_of", making)
    monkeypatch.setattr(Stepper, "close", failing)
    directories = [tmp_path / str(place) for place in range(3)]
    each = experiments(backbone_dir("bert"), rows_file)
    ended = {
        place: type(event).__name__
        for place, event in finish(execution.execute_together(each, directories)).items()
    }
    assert ended == {0: "Finished", 1: "Failed", 2: "Finished"}
    with pytest.raises(RunError, match="unfinished"):
        run.read_run(directories[1])


def test_a_directory_that_is_there_stops_all_before_any_begins(
    backbone_dir: Callable[[str], Path], rows_file: Path, tmp_path: Path
) -> None:
    each = experiments(backbone_dir("bert"), rows_file)
    directories = [tmp_path / str(place) for place in range(3)]
    directories[2].mkdir()
    write_rows(directories[2] / "mine.csv")
    with pytest.raises(RunError, match="exists already"):
        list(execution.execute_together(each, directories))
    assert not directories[0].exists()


@pytest.mark.parametrize("global_seed", [0, 1])
def test_one_run_that_ends_early_leaves_the_pass_as_it_was(
    backbone_dir: Callable[[str], Path], global_seed: int
) -> None:
    def loop(name: int) -> Training:
        return loop_of(backbone_dir("bert"), name, 12, epochs=(2, 5)[name])

    alone = [event.loss for event in loop(1).events() if isinstance(event, Step)]
    loops = {name: loop(name) for name in (0, 1)}
    sharing.share(loops[0].tuned, loops[1].tuned)
    torch.manual_seed(global_seed)
    steps: dict[int, list[float]] = {0: [], 1: []}
    over = []
    for name, event in shared_passes.train_together(loops):
        if isinstance(event, Step):
            steps[name].append(event.loss)
        if event is None:
            over.append(name)
    assert over == [0, 1]
    assert (len(steps[0]), len(steps[1])) == (4, 10)
    assert steps[1] == pytest.approx(alone, abs=1e-5)


def test_a_run_that_cannot_be_stored_does_not_stop_the_others(
    backbone_dir: Callable[[str], Path],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verify = Writer.verify

    def failing(self: Writer, *given: Any) -> float:
        if self.directory.name == "1":
            raise CheckError("the reloaded model's logits differ", "report it")
        return verify(self, *given)

    monkeypatch.setattr(Writer, "verify", failing)
    each = experiments(backbone_dir("bert"), rows_file)
    ended = finish(execution.execute_together(each, [tmp_path / str(place) for place in range(3)]))
    kinds = {place: type(event).__name__ for place, event in ended.items()}
    assert kinds == {0: "Finished", 1: "Failed", 2: "Finished"}


def test_runs_one_after_another_take_their_own_time_and_are_let_go(
    backbone_dir: Callable[[str], Path],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    each = experiments(backbone_dir("bert"), rows_file, "bitfit")
    loops: list[weakref.ref[Training]] = []
    make = planning.loop_of

    def making(*given: Any) -> Training:
        loop = make(*given)
        loops.append(weakref.ref(loop))
        return loop

    monkeypatch.setattr(session, "loop_of", making)
    start, seconds = time.perf_counter(), 0.0
    for _, event in execution.execute_together(each, [tmp_path / str(n) for n in range(3)]):
        if isinstance(event, Ready):
            gc.collect()
            assert not any(loop() for loop in loops[:-1]), "an earlier run is still held"
        if isinstance(event, Finished):
            seconds += event.result["seconds"]
    assert len(loops) == 3
    assert seconds < time.perf_counter() - start
