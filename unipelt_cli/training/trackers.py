"""Trackers that watch runs beside the progress line: TensorBoard, and Weights & Biases.

They are told numbers and settings, never texts. What there is to say of them goes to a function
that the caller gives. What breaks in one ends that one, never a run.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from unipelt_cli.runs.names import EXPERIMENT
from unipelt_cli.text import first_line
from unipelt_cli.training.events import Epoch, Event, Failed, Finished, Ready, Step

PROJECT = "unipelt"
STEPS_TOLD = 10  # of an epoch
INIT_SECONDS = 20.0
Started = tuple[Any, str]  # a tracker of accelerate's, and where it can be looked at


class Tracking:
    """The trackers of some runs: each run is one run of every tracker.

    Their step counts the optimiser's, so that a resumed run goes on where it stopped. `say` shows
    a line, in parts that are a text or a text with its style.
    """

    def __init__(
        self, trackers: Sequence[str], directories: Sequence[Path], say: Callable[..., None]
    ) -> None:
        self._names = list(dict.fromkeys(trackers))
        self._say = say
        self._places: list[str] = []
        self._runs = [_Run(directory) for directory in directories]

    def see(self, run_index: int, event: Event | Failed) -> None:
        """Tell the trackers of the run at a place what has happened to it."""
        run = self._runs[run_index]
        match event:
            case Ready():
                run.step = event.taken
                self._start(run, event)
            case Step():
                run.step += 1
                parts = (STEPS_TOLD * step // event.steps for step in (event.step - 1, event.step))
                if len(set(parts)) > 1:
                    self._log(run, {"step_loss": event.loss})
            case Epoch():
                speed = event.tokens / max(event.train_seconds, 1e-9)
                gates = {str(layer): value for layer, value in enumerate(event.gates)}
                values = {**asdict(event), "gates": gates, "tokens_per_second": speed}
                self._log(run, _numbers(values))
            case Finished():
                scores = _numbers({"test": event.result["test"]})
                result = event.result.items()
                rest = {key: value for key, value in result if key not in ("dev", "test")}
                self._log(run, {**scores, **_numbers({"result": rest})})
                self._finish(run)
            case Failed():
                self._finish(run)

    def close(self) -> None:
        """Finish what is still tracked, such as runs that were interrupted."""
        for run in self._runs:
            self._finish(run)

    def _start(self, run: "_Run", ready: Ready) -> None:
        for name in list(self._names):
            if started := self._try(name, partial(_STARTS[name], run, ready)):
                run.trackers[name], address = started
                if address not in self._places:
                    self._places.append(address)
                    self._say(f"{name}: ", (address, "bold"))

    def _log(self, run: "_Run", values: Mapping[str, float]) -> None:
        for name, tracker in list(run.trackers.items()):
            self._try(name, partial(tracker.log, values, step=run.step))

    def _finish(self, run: "_Run") -> None:
        for name in list(run.trackers):
            self._try(name, run.trackers.pop(name).finish)

    def _try(self, name: str, do: Callable[[], Any]) -> Any:
        """Do what a tracker may fail at; then warn once, and tell it of no run any more."""
        try:
            return do()
        except Exception as error:  # whatever a library raises over a disk or a network
            self._names.remove(name)
            for run in self._runs:
                run.trackers.pop(name, None)
            warning = f"{name} has failed, and nothing more is told to it ({first_line(error)})"
            self._say(("warning: ", "yellow"), warning)
            return None


class _Run:
    """One run as its trackers see it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trackers: dict[str, Any] = {}
        self.step = 0


def _tensorboard(run: _Run, ready: Ready) -> Started:
    """Start a TensorBoard run in `tensorboard/` beside the run directory, whose files are fixed."""
    from accelerate.tracking import TensorBoardTracker
    from torch.utils.tensorboard.summary import hparams

    root = run.directory.parent / "tensorboard"
    # What a replaced run left under this name, or a killed one told after its state, is hidden.
    purged = ready.taken + 1 if ready.taken else 0
    tracker = TensorBoardTracker(run.directory.name, root, purge_step=purged)
    tracker.start()
    if not ready.taken:
        scored = [name for name in ("dev", "test") if name == "test" or ready.has_dev]
        scores = {f"{split}/{ready.metric}": 0.0 for split in scored}
        experiment, begun, _ = hparams(_settings(ready), scores)  # type: ignore[no-untyped-call]
        for summary in (experiment, begun):
            tracker.tracker.file_writer.add_summary(summary)
    return tracker, str(root)


def _wandb(run: _Run, ready: Ready) -> Started:
    """Start a run of Weights & Biases; its local files go to `wandb/` beside the run directory."""
    import wandb
    from accelerate import PartialState
    from accelerate.tracking import WandBTracker

    PartialState()  # the tracker's own log asks for it
    settings = wandb.Settings(
        console="off",
        disable_git=True,
        save_code=False,
        init_timeout=INIT_SECONDS,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.directory.name,
        id=_identity(run.directory),
        resume="allow",
        reinit="create_new",
        dir=str(run.directory.parent),
        config=_settings(ready),
        settings=settings,
    )
    tracker.start()
    wandb_run = tracker.tracker
    if wandb_run.offline:
        return tracker, f"wandb sync {wandb_run.settings.sync_dir}"
    return tracker, str(wandb_run.url or wandb_run.settings.mode)


_STARTS: Mapping[str, Callable[[_Run, Ready], Started]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def _identity(directory: Path) -> str:
    """Name a run for a tracker: the same after a resume, another one after --overwrite.

    Its first file is written once, when the run begins.
    """
    begun = (directory / EXPERIMENT).stat().st_mtime_ns
    return hashlib.sha256(f"{directory.resolve()} {begun}".encode()).hexdigest()[:16]


def _settings(ready: Ready) -> dict[str, str | float]:
    return {
        f"{section}.{key}": ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        for section, values in ready.experiment.settings().items()
        for key, value in values.items()
    }


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return all numbers in nested mappings, each under the names that lead to it."""
    return dict(_leaves(values, prefix))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)
