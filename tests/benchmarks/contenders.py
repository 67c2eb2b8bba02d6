"""The work that every contender does, and our side of it."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel

from unipelt_cli.backbones.minilm import MINILM
from unipelt_cli.backbones.pretrained import Pretrained, find
from unipelt_cli.backbones.tokenizer_files import TOKENIZER_FILES, TOKENIZER_SETTINGS
from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.data import preparation
from unipelt_cli.models import sharing
from unipelt_cli.models.batches import Encoded, encode
from unipelt_cli.models.build import build
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.tasks import get_task
from unipelt_cli.training import shared_passes
from unipelt_cli.training.events import Epoch, Labelled
from unipelt_cli.training.loop import Training

TASK = "mrpc"
METHOD = "unipelt-apl"
BATCH = 16
LENGTH = 128
ENOUGH_EPOCHS = 1000  # so that the rate schedule neither warms up nor ends
WARM_ROWS = (2 * BATCH, 4 * BATCH)


@dataclass(frozen=True)
class Rows:
    """Token ids and labels of a train and a dev split."""

    train: Labelled
    dev: Labelled

    def head(self, train: int, dev: int) -> "Rows":
        """Return the first rows of each split."""
        return Rows(_head(self.train, train), _head(self.dev, dev))


@dataclass(frozen=True)
class Lap:
    """Seconds of one epoch; `cpu` is what all threads took, less moved by a busy machine."""

    seconds: float
    cpu: float
    training: float
    evaluation: float


@dataclass(frozen=True)
class Work:
    """What is measured: everything that a process of its own needs to do the same."""

    source: str | None
    k: int
    dev_size: int
    backbone: str
    precision: str
    threads: int

    @property
    def pretrained(self) -> Pretrained:
        return find(self.backbone)

    def experiment(self, precision: str | None = None, seed: int = 42) -> Experiment:
        """Return our settings, with another precision or seed if given."""
        settings: dict[str, dict[str, Any]] = {
            "data": {"task": TASK, "k": self.k, "dev_size": self.dev_size},
            "model": {"backbone": self.backbone, "max_length": LENGTH},
            "method": {"name": METHOD},
            "train": {
                "epochs": ENOUGH_EPOCHS,
                "batch_size": BATCH,
                "precision": precision or self.precision,
                "seed": seed,
            },
        }
        if self.source is not None:
            settings["data"]["source"] = self.source
        return resolve([("", settings)])

    def tuned(self, precision: str | None = None, *, folded: bool = False) -> TunedModel:
        """Build our model."""
        return build(self.experiment(precision), 2, folded=folded)

    def rows(self) -> Rows:
        """Tokenize the source's rows, or draw random ones."""
        if self.source is None:
            return Rows(_random(self.k, 0), _random(self.dev_size, 1))
        prepared = preparation.prepare(self.experiment().data)
        tokenizer, config = self.pretrained.load_tokenizer(), self.pretrained.library_config()
        splits = {
            name: (
                encode(
                    [prepared.splits[name][column] for column in prepared.task.text],
                    tokenizer,
                    config,
                    max_length=LENGTH,
                ),
                np.asarray(prepared.splits[name]["label"]),
            )
            for name in ("train", "dev")
        }
        return Rows(**splits)


def _head(split: Labelled, count: int) -> Labelled:
    rows, labels = split
    types = None if rows.types is None else rows.types[:count]
    return replace(rows, ids=rows.ids[:count], types=types), labels[:count]


def _random(count: int, seed: int) -> Labelled:
    """Draw pairs of random words, as long as MRPC's."""
    random = np.random.default_rng(seed)
    ids, types = [], []
    for length in random.normal(53, 15, count).round().clip(16, LENGTH).astype(int):
        first = int(length) // 2
        words = random.integers(2000, 29000, length)
        words[0], words[first - 1], words[-1] = 101, 102, 102  # [CLS] ... [SEP] ... [SEP]
        ids.append(words.tolist())
        types.append([0] * first + [1] * (int(length) - first))
    return Encoded(ids, types, 0), np.arange(count) % 2


def save_backbone(name: str, directory: Path) -> str:
    """Return a backbone that both sides can load; bert-base gets random weights."""
    packaged = find(MINILM).directory
    if name == MINILM:
        return MINILM
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(directory)
    for file in (*TOKENIZER_FILES, *TOKENIZER_SETTINGS):
        if (packaged / file).is_file():
            shutil.copy(packaged / file, directory)
    return str(directory)


def our_epoch(work: Work, tuned: TunedModel, rows: Rows) -> Callable[[], Lap]:
    """Return a call that trains and evaluates once; the only place that knows the loop's parts."""
    settings = work.experiment().train
    loop = Training(tuned, get_task(TASK), rows.train, rows.dev, settings)
    loop._prepare()

    def run() -> Lap:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in loop.drive(loop.train_epoch()):
            pass
        epoch = loop.score_epoch()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Lap(seconds, cpu, epoch.train_seconds, epoch.evaluation_seconds)

    return run


def our_epochs_together(work: Work, runs: int, rows: Rows) -> Callable[[], None]:
    """Return a call that trains and evaluates several runs once, in one pass each step."""
    tuned = [work.tuned() for _ in range(runs)]
    for other in tuned[1:]:
        sharing.share(tuned[0], other)

    def run() -> None:
        task = get_task(TASK)
        loops = {
            place: Training(one, task, rows.train, rows.dev, work.experiment(seed=place).train)
            for place, one in enumerate(tuned)
        }
        epochs = 0
        for _, event in shared_passes.train_together(loops):
            epochs += isinstance(event, Epoch)
            if epochs == runs:
                return

    return run


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes, with all it left to a GPU."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every call once a round, in turn, so that a machine's moods meet all alike."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            spent[name].append(timed(call))
    return spent


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    """Return the median, least and largest ratio of two contenders in the same round."""
    own = [one / other for one, other in zip(above, below, strict=True)]
    return {"median": median(own), "min": min(own), "max": max(own)}
