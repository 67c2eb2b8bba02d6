"""Writing a run directory: file by file, in an order that never lets a part pass for the whole.

`experiment.toml` comes first, `result.json` last: its presence means that the run is finished.
One process at a time writes in a directory.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.config.toml import dump
from unipelt_cli.errors import CheckError, RunError
from unipelt_cli.files import atomic
from unipelt_cli.files.lock import LOCK, DirectoryLock
from unipelt_cli.files.sealed import FORMAT, file_digest, with_seal, write_tensors
from unipelt_cli.metrics import Values
from unipelt_cli.models.label_scale import RAW, LabelScale
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.names import (
    ENVIRONMENT,
    EXPERIMENT,
    FOLDS,
    METRICS,
    MODEL,
    PREDICTIONS,
    PROBE,
    RECORDED,
    RESULT,
    STATE,
)
from unipelt_cli.runs.probe import likeness, probe, write_probe
from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.tasks import Task, joint_positive
from unipelt_cli.version import __version__

PACKAGES = ("torch", "transformers", "adapters", "datasets", "safetensors", "numpy")
_FILES = (*RECORDED, RESULT, STATE)
_TASK_KEYS = ("name", "text", "labels", "metric", "also")


class Writer:
    """Writes one run directory, file by file, each one whole or not there.

    From `check` on, or `create` where the directory is new, until `close` it holds the right
    to write there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._claim: DirectoryLock | None = None

    def check(self, *, overwrite: bool = False) -> None:
        """Raise RunError now for a directory that `create` could not make later.

        One that exists needs `overwrite`, may hold no file that no run wrote, and may not be
        another process's.
        """
        if atomic.writable(self.directory) == self.directory:
            self.claim()
            self._check_content(overwrite)

    def check_without_claiming(self, *, overwrite: bool = False) -> None:
        """Raise RunError for what `check` would find now, but take no right and write nothing."""
        if atomic.writable(self.directory) == self.directory:
            self._check_content(overwrite)

    def claim(self) -> None:
        """Take the right to write in the directory; raise RunError while another has it."""
        if self._claim is None:
            self._claim = DirectoryLock(self.directory)

    def close(self) -> None:
        """Give the right to write back."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def _check_content(self, overwrite: bool) -> None:
        directory = self.directory
        with atomic.writing(directory):
            present = [path.name for path in directory.iterdir() if not _is_passing(path.name)]
        if present and not overwrite:
            raise RunError(
                f"{directory}: exists already",
                "go on with --resume, replace it with --overwrite, or give another --out",
            )
        if foreign := sorted(set(present) - {*_FILES, *_folds(directory)}):
            raise RunError(
                f"{directory}: holds files that no run wrote, such as {foreign[0]}",
                "give another --out",
            )

    def create(self, *, overwrite: bool = False) -> None:
        """Make the directory, or empty it of an earlier run's files."""
        with atomic.writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.claim()
            self._check_content(overwrite)
            # The result goes first: what is left of an emptied run must not look finished. Nor
            # may files stay without the experiment that says whose they are.
            for name in (RESULT, STATE, *reversed(RECORDED)):
                (self.directory / name).unlink(missing_ok=True)
            for name in _folds(self.directory):
                shutil.rmtree(self.directory / name)
        self.clean_up()

    def clean_up(self) -> None:
        """Remove what a killed process was writing, and what a finished run needs no more."""
        for path in self.directory.glob(f"{atomic.TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
        if (self.directory / RESULT).is_file():
            with suppress(OSError):
                (self.directory / STATE).unlink()
            for name in _folds(self.directory):
                shutil.rmtree(self.directory / name, ignore_errors=True)

    def experiment(self, experiment: Experiment) -> None:
        """Write the resolved experiment, the first file of a run."""
        atomic.write(self.directory / EXPERIMENT, dump(experiment).encode())

    def environment(
        self,
        tuned: TunedModel,
        manifest: Mapping[str, Any],
        command: list[str],
        processes: int = 1,
    ) -> None:
        """Write what the result depends on beside the experiment."""
        atomic.write_json(
            self.directory / ENVIRONMENT,
            {
                "unipelt": __version__,
                "python": platform.python_version(),
                "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
                "platform": platform.platform(),
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "processes": processes,
                "device": _device_name(tuned.device),
                "command": command,
                "backbone": {**_backbone(tuned), "files": tuned.pretrained.digests},
                "data": manifest,
            },
        )

    def metric(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append one event to metrics.jsonl."""
        path = self.directory / METRICS
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with atomic.writing(path), os.fdopen(os.open(path, flags, 0o666), "wb") as file:
            file.write((json.dumps({"kind": kind, **values}) + "\n").encode())

    def rewind(self, epoch: int) -> None:
        """Drop the events that a resumed loop will log again: from `epoch` on, and the stop."""
        kept = [event for event in read_metrics(self.directory) if event["epoch"] < epoch]
        lines = "".join(json.dumps(event) + "\n" for event in kept)
        atomic.write(self.directory / METRICS, lines.encode())

    def state(
        self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any], seconds: float
    ) -> None:
        """Write what an interrupted loop goes on from, and the seconds that the run has taken."""
        header = {"counters": counters, "seconds": seconds}
        write_tensors(self.directory / STATE, tensors, header)

    def model(
        self, tuned: TunedModel, tasks: Sequence[Task], scales: Sequence[LabelScale], method: str
    ) -> Tensor:
        """Write the stored tensors and return the probe logits of the model that was trained.

        They give values on the labels' scale; the scale is written for what compares them.
        """
        descriptions = [_described(task, scale) for task, scale in zip(tasks, scales, strict=True)]
        header = {
            "format_version": FORMAT,
            "method": method,
            **({"task": descriptions[0]} if len(descriptions) == 1 else {"tasks": descriptions}),
            "backbone": _backbone(tuned),
            "pooling": tuned.pooling,
            "precision": tuned.precision,
        }
        write_tensors(self.directory / MODEL, tuned.stored(), header)
        return torch.from_numpy(probe(tuned))

    def verify(
        self, reloaded: TunedModel, trained: Tensor, units: Tensor, exact: Tensor | None = None
    ) -> None:
        """Compare the reloaded model's probe logits with the trained one's, and store them.

        `exact` are those that it gives in fp32, where it computes in bf16 itself. Raises CheckError
        when they differ: then what was stored is not what was trained.
        """
        logits, precision = torch.from_numpy(probe(reloaded)), reloaded.precision
        comparison = likeness(logits / units, trained / units, precision, is_alike=True)
        if not comparison.holds:
            raise CheckError(
                f"{self.directory}: the reloaded model's logits differ by "
                f"{comparison.difference:.2g}",
                "this is a bug in unipelt: please report it with the experiment.toml",
            )
        write_probe(self.directory / PROBE, precision, logits, exact)

    def predictions(
        self, predicted: Sequence[Values], expected: Sequence[Values], split: str = "test"
    ) -> None:
        """Write each task's predictions and references on test: label indices, or values.

        Where folds are tested they are those of the train rows, in their order.
        """
        tensors = {
            f"{what}.{task_index}": torch.from_numpy(values).to(
                torch.float64 if values.dtype.kind == "f" else torch.int32
            )
            for what, each in (("predictions", predicted), ("references", expected))
            for task_index, values in enumerate(each)
        }
        write_tensors(self.directory / PREDICTIONS, tensors, {"split": split})

    def result(self, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write the result, the last file, with the hashes of all others: now it is finished."""
        with atomic.writing(self.directory / METRICS):
            atomic.sync(self.directory / METRICS)
        files = {name: file_digest(self.directory / name) for name in RECORDED}
        sealed = with_seal({**result, "files": files})
        atomic.write_json(self.directory / RESULT, sealed)
        self.clean_up()
        return sealed


def _folds(directory: Path) -> list[str]:
    """Return the name of the folder with the folds of an unfinished run, where it is one."""
    folder = directory / FOLDS
    if not folder.is_dir() or folder.is_symlink():
        return []
    names = [path.name for path in folder.iterdir()]
    return [FOLDS] if all(re.fullmatch(r"fold-\d+", name) for name in names) else []


def _is_passing(name: str) -> bool:
    """Say whether a file is there only while a run is written, or was when one was killed."""
    return name == LOCK or name.startswith(atomic.TEMPORARY)


def _backbone(tuned: TunedModel) -> Mapping[str, Any]:
    pretrained = tuned.pretrained
    return {
        "name": pretrained.name,
        "model_type": pretrained.layout.model_type,
        "revision": pretrained.revision,
        "fingerprint": pretrained.fingerprint,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


def command_line() -> list[str]:
    """Return the command that runs, without the directory the program lies in."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _described(task: Task, scale: LabelScale) -> Mapping[str, Any]:
    """Return what a stored model says of a task."""
    kept = {key: value for key, value in asdict(task).items() if key in _TASK_KEYS}
    comma = {"decimal_comma": True} if task.decimal_comma else {}
    standardised = {} if scale == RAW else {"label_scale": asdict(scale)}
    return kept | joint_positive([task]) | comma | standardised
