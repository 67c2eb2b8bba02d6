"""The run directory: what a run writes, in which order, and how it is read back strictly.

`result.json` is written last and atomically: its presence means that the run is finished.
"""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from unipelt_cli import __version__, artifact, data, formats
from unipelt_cli.batches import Encoded
from unipelt_cli.config import Experiment, dump, read_preset, resolve
from unipelt_cli.errors import CheckError, ConfigError, DataError, RunError, nearest
from unipelt_cli.evaluation import Logits, compute_logits
from unipelt_cli.modeling import Tuned, build
from unipelt_cli.pretrained import Pretrained, find
from unipelt_cli.tasks import Task

EXPERIMENT, ENVIRONMENT, PROBE = "experiment.toml", "environment.json", "probe.safetensors"
METRICS, MODEL, RESULT, STATE = (
    "metrics.jsonl",
    "model.safetensors",
    "result.json",
    "state.safetensors",
)
FILES = (EXPERIMENT, ENVIRONMENT, PROBE, METRICS, MODEL, RESULT, STATE)
PROBE_ROWS = 64
PROBE_TOLERANCE = 1e-4
ROUGH_TOLERANCE = 0.1  # in bf16, and on another kind of device
PACKAGES = ("torch", "transformers", "adapters", "datasets", "safetensors", "numpy")


@dataclass(frozen=True)
class Run:
    """A finished run, read from its directory; the backbone is not loaded yet."""

    directory: Path
    experiment: Experiment
    environment: dict[str, Any]
    header: dict[str, Any]
    result: dict[str, Any]

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks as they were trained: text columns, labels and metric."""
        return tuple(
            Task(
                said["name"],
                tuple(said["text"]),
                tuple(said["labels"]),
                said["metric"],
                tuple(said["also"]),
            )
            for said in self.header.get("tasks") or [self.header["task"]]
        )

    @property
    def task(self) -> Task:
        """The task of a run that has one; of several the first."""
        return self.tasks[0]

    def place(self, name: str | None) -> int:
        """Return the place of a task among the run's; the name may be left out if there is one.

        Raises ConfigError where it may not, and for a task that the run was not trained on.
        """
        names = [task.name for task in self.tasks]
        if name is None and len(names) > 1:
            raise ConfigError(
                f"{self.directory}: trained on several tasks ({', '.join(names)})",
                "say which one with --task NAME",
            )
        if name is not None and name not in names:
            raise ConfigError(
                f"--task {name!r}: {self.directory} was not trained on it", nearest(name, names)
            )
        return 0 if name is None else names.index(name)

    def build(self, device: str | None = None) -> Tuned:
        """Build the model on its backbone and load what was stored, strictly.

        Raises RunError when the backbone is another one, or a tensor is missing, extra,
        reshaped, not finite or changed.
        """
        experiment = self.experiment
        if device is not None:
            experiment = experiment.replace("train", device=device)
        pretrained = find(experiment.model.backbone)
        expected = self.header["backbone"]
        if pretrained.fingerprint != expected["fingerprint"]:
            raise RunError(
                f"{self.directory}: trained on backbone {expected['name']} "
                f"({expected['fingerprint'][:12]}), but {pretrained.name} is "
                f"({pretrained.fingerprint[:12]})",
                "give the backbone that the run was trained on",
            )
        tuned = _load(self.directory, experiment, self.tasks, self.header["sha256"], pretrained)
        self._compare_probe(tuned)
        return tuned

    def _compare_probe(self, tuned: Tuned) -> None:
        """Raise RunError when the model computes something else than when it was saved."""
        stored = artifact.open_tensors(self.directory / PROBE)[0].get("logits")
        logits = torch.from_numpy(probe(tuned))
        same = (tuned.precision, tuned.device.type) == ("fp32", self.result["device"])
        bound = PROBE_TOLERANCE if same else ROUGH_TOLERANCE
        if stored is None or stored.shape != logits.shape:
            raise RunError(f"{self.directory / PROBE}: damaged", artifact.REMEDY)
        difference = float((logits - stored).abs().max())
        if not difference <= bound:
            raise RunError(
                f"{self.directory}: computes other logits than when it was saved "
                f"(they differ by {difference:.2g})",
                "its settings or a library have changed: restore them, or train it again",
            )

    def rows(self, split: str, source: str | None = None, place: int = 0) -> Dataset:
        """Find the rows of a task's split again, by source and settings, and check them by hash."""
        settings = self.experiment.data.each()[place]
        if source is not None:
            settings = settings.model_copy(update={"source": source, "prepared": None})
        recorded = self._manifests[place]["splits"]
        if split not in recorded:
            raise DataError(f"split {split!r}: not in this run", f"choose {', '.join(recorded)}")
        found = data.prepare(settings).splits[split]
        if data.digest(found) != recorded[split]["digest"]:
            raise DataError(
                f"the {split} rows found now are not those of {self.directory}",
                "the source has changed; give the one that was used with --source",
            )
        return found

    @property
    def _manifests(self) -> list[dict[str, Any]]:
        recorded = self.environment["data"]
        return list(recorded["tasks"].values()) if len(self.tasks) > 1 else [recorded]


def read(directory: Path) -> Run:
    """Read a finished run; raise RunError when it is absent, unfinished, damaged or newer."""
    if not (directory / EXPERIMENT).is_file():
        raise RunError(f"{directory}: not a run directory", "give a directory that `train` wrote")
    if not (directory / RESULT).is_file():
        raise RunError(
            f"{directory}: unfinished, {describe_progress(directory)}",
            "go on with `unipelt train ... --resume`, or start again with --overwrite",
        )
    header = artifact.read_header(directory / MODEL)
    environment = artifact.read_object(directory / ENVIRONMENT)
    result = artifact.read_object(directory / RESULT)
    joint = "tasks" in header
    formats.shaped(directory / MODEL, header, formats.JointHeader if joint else formats.Header)
    expected = formats.JointEnvironment if joint else formats.Environment
    formats.shaped(directory / ENVIRONMENT, environment, expected)
    formats.shaped(directory / RESULT, result, formats.Result)
    return Run(directory, read_experiment(directory), environment, header, result)


def read_stored(
    directory: Path, experiment: Experiment, tasks: Sequence[Task], trained: Tuned
) -> Tuned:
    """Build the model that an unfinished run has just stored, read back from its file."""
    header = artifact.read_header(directory / MODEL)
    return _load(directory, experiment, tasks, header["sha256"], trained.pretrained)


def _load(
    directory: Path,
    experiment: Experiment,
    tasks: Sequence[Task],
    sha256: str,
    pretrained: Pretrained,
) -> Tuned:
    tuned = build(experiment, [task.outputs for task in tasks], pretrained, folded=True)
    tuned.load(artifact.read_tensors(directory / MODEL, tuned.stored(), sha256))
    return tuned


def check_rows(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise DataError when rows found now are not those that a run started with."""
    environment = artifact.read_object(directory / ENVIRONMENT)
    if environment.get("data") != manifest:
        raise DataError(
            f"{directory}: the rows have changed since the run started",
            "restore them, or start again with --overwrite",
        )


def read_experiment(directory: Path) -> Experiment:
    """Read the resolved experiment of a run directory."""
    return resolve([("", read_preset(str(directory / EXPERIMENT)))])


def describe_progress(directory: Path) -> str:
    """Say how far an unfinished run got."""
    epochs = [event for event in read_metrics(directory) if event.get("kind") == "epoch"]
    return f"stopped after epoch {epochs[-1]['epoch']}" if epochs else "no epoch done"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the events of metrics.jsonl; a last line cut short by a crash is left out."""
    path = directory / METRICS
    events = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                events.append(event)
    return events


class Writer:
    """Writes one run directory, file by file, each one whole or not there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def check(self, *, overwrite: bool = False) -> None:
        """Raise RunError now for a directory that `create` could not make later.

        One that exists needs `overwrite`, and may hold no file that no run wrote.
        """
        directory = self.directory
        nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        with artifact.writing(directory):
            if not nearest.is_dir():
                raise NotADirectoryError(None, "Not a directory")
            if not os.access(nearest, os.W_OK | os.X_OK):
                raise PermissionError(None, "Permission denied")
            there = [path.name for path in directory.iterdir()] if nearest == directory else []
        if there and not overwrite:
            raise RunError(
                f"{directory}: exists already",
                "go on with --resume, replace it with --overwrite, or give another --out",
            )
        if foreign := sorted(name for name in there if not _is_ours(name)):
            raise RunError(
                f"{directory}: holds files that no run wrote, such as {foreign[0]}",
                "give another --out",
            )

    def create(self) -> None:
        """Make the directory, or empty it of an earlier run's files."""
        with artifact.writing(self.directory):
            # The result goes first: what is left of an emptied run must not look finished.
            (self.directory / RESULT).unlink(missing_ok=True)
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                path.unlink()

    def experiment(self, experiment: Experiment) -> None:
        """Write the resolved experiment, the first file of a run."""
        artifact.write(self.directory / EXPERIMENT, dump(experiment).encode())

    def environment(self, tuned: Tuned, manifest: Mapping[str, Any], command: list[str]) -> None:
        """Write what the result depends on beside the experiment."""
        artifact.write_json(
            self.directory / ENVIRONMENT,
            {
                "unipelt": __version__,
                "python": platform.python_version(),
                "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
                "platform": platform.platform(),
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "device": _device_name(tuned.device),
                "command": command,
                "backbone": _backbone(tuned),
                "data": manifest,
            },
        )

    def metric(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append one event to metrics.jsonl."""
        path = self.directory / METRICS
        with artifact.writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")

    def rewind(self, epoch: int) -> None:
        """Drop the events that a resumed loop will log again: from `epoch` on, and the stop."""
        kept = [event for event in read_metrics(self.directory) if event.get("epoch", 0) < epoch]
        lines = "".join(json.dumps(event) + "\n" for event in kept)
        artifact.write(self.directory / METRICS, lines.encode())

    def state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Write what an interrupted loop goes on from."""
        artifact.write_tensors(self.directory / STATE, tensors, counters)

    def model(self, tuned: Tuned, tasks: Sequence[Task], method: str) -> Tensor:
        """Write the stored tensors and return the probe logits of the model that was trained."""
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in tuned.stored().items()
        }
        said = [
            {key: value for key, value in asdict(task).items() if key in _TASK_KEYS}
            for task in tasks
        ]
        header = {
            "format_version": artifact.FORMAT,
            "method": method,
            **({"task": said[0]} if len(said) == 1 else {"tasks": said}),
            "backbone": _backbone(tuned),
            "pooling": tuned.pooling,
            "precision": tuned.precision,
            "sha256": artifact.digest(tensors),
        }
        artifact.write_tensors(self.directory / MODEL, tensors, header)
        return torch.from_numpy(probe(tuned))

    def verify(self, reloaded: Tuned, trained: Tensor) -> float:
        """Compare the reloaded model's probe logits with the trained one's, and store them.

        Raises CheckError when they differ: then what was stored is not what was trained.
        """
        logits = torch.from_numpy(probe(reloaded))
        difference = float((logits - trained).abs().max())
        if not difference <= PROBE_TOLERANCE:
            raise CheckError(
                f"{self.directory}: the reloaded model's logits differ by {difference:.2g}",
                "this is a bug in unipelt: please report it with the experiment.toml",
            )
        artifact.write_tensors(self.directory / PROBE, {"logits": logits}, {"rows": PROBE_ROWS})
        return difference

    def result(self, result: Mapping[str, Any]) -> None:
        """Write the result, the last file: now the run is finished."""
        artifact.write_json(self.directory / RESULT, result)
        (self.directory / STATE).unlink(missing_ok=True)


def _is_ours(name: str) -> bool:
    """Say whether a run wrote a file of this name; a killed one leaves temporary files."""
    return name in FILES or any(name.startswith(f".{own}.") for own in FILES)


def read_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the saved loop state of an interrupted run, or None where there is none."""
    path = directory / STATE
    if not path.is_file():
        return None
    return artifact.open_tensors(path)


def probe(tuned: Tuned) -> Logits:
    """Return all heads' logits of the probe rows: a fingerprint without user text."""
    rows, tasks = probe_rows(tuned), range(len(tuned.classifier.heads))
    return np.concatenate([compute_logits(tuned, rows, task) for task in tasks], axis=1)


def probe_rows(tuned: Tuned) -> Encoded:
    """Draw 64 rows of seeded random tokens that a model's backbone can read."""
    config: Any = tuned.classifier.backbone.config
    random = np.random.default_rng(0)
    pad_id = config.pad_token_id or 0
    ids = [
        [int(token) for token in random.integers(0, config.vocab_size, length) if token != pad_id]
        or [(pad_id + 1) % config.vocab_size]
        for length in random.integers(4, 33, PROBE_ROWS)
    ]
    native = tuned.pretrained.layout.native
    if native is not None and native.reads_last:  # its classifier looks for one end mark a row
        end = config.eos_token_id
        ids = [[*(token for token in row if token != end), end] for row in ids]
    limit = tuned.pretrained.layout.positions(config)
    has_types = getattr(config, "type_vocab_size", 0) > 1
    return Encoded(
        [row[:limit] for row in ids],
        [[0] * len(row[:limit]) for row in ids] if has_types else None,
        pad_id,
    )


_TASK_KEYS = ("name", "text", "labels", "metric", "also")


def _backbone(tuned: Tuned) -> dict[str, str]:
    pretrained = tuned.pretrained
    return {
        "name": pretrained.name,
        "model_type": pretrained.layout.model_type,
        "fingerprint": pretrained.fingerprint,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


def command_line() -> list[str]:
    """Return the command that runs, without the directory the program lies in."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
