"""SetFit on the same rows and the same backbone folder, with what its documentation trains with.

Needs setfit 1.2: pip install setfit
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from tests.benchmarks.score_runs import SCORED, Outcome, Rows, score_all
from unipelt_cli.backbones.pretrained import find
from unipelt_cli.metrics import Values
from unipelt_cli.tasks import Task

BATCH, EPOCHS, SEED = 16, 1, 42
PACKAGES = ("setfit", "sentence-transformers", "transformers", "torch", "scikit-learn")


@dataclass(frozen=True)
class SetFit:
    """Contrastive training of the whole backbone, then a logistic head; k rows, no dev row."""

    backbone: str
    name: str = "setfit"

    def absence(self) -> str | None:
        try:
            import_module("setfit")
        except ImportError as error:
            return f"`import setfit` fails ({error})"
        return None

    def refusal(self, task: Task) -> str | None:
        return "it has no regression" if task.is_regression else None

    def caveat(self, task: Task) -> str | None:
        return "a pair is one text, joined by the tokenizer's separator" if task.text[1:] else None

    def recipe(self, rows: Rows) -> str:
        backbone = find(self.backbone).fingerprint
        return f"batch {BATCH}, epochs {EPOCHS}, seed {SEED}, backbone {backbone}"

    def run(self, rows: Rows, directory: Path) -> Outcome:
        pretrained = find(self.backbone)
        separator = f" {pretrained.load_tokenizer().sep_token} "
        texts = {split: _texts(rows, split, separator) for split in ("train", *SCORED)}
        labels = list(rows.prepared.splits["train"]["label"])
        train = Dataset.from_dict({"text": texts["train"], "label": labels})
        start = time.perf_counter()
        model = _train(pretrained.directory, train)
        trained = time.perf_counter()
        predicted = {split: _predict(model, texts[split]) for split in SCORED}
        return Outcome(
            recipe=self.recipe(rows),
            packages={name: version(name) for name in PACKAGES},
            digests=rows.digests,
            scores=score_all(rows.task, rows.prepared, predicted),
            predictions={split: values.tolist() for split, values in predicted.items()},
            seconds=round(trained - start, 3),
            inference_seconds=round(time.perf_counter() - trained, 3),
            labels_read=len(labels),
            selected_on_dev=False,
        )


def _texts(rows: Rows, split: str, separator: str) -> list[str]:
    """Return a split's texts; a pair is one text, since SetFit reads no pairs."""
    columns = [rows.prepared.splits[split][name] for name in rows.task.text]
    return [separator.join(texts) for texts in zip(*columns, strict=True)]


def _train(folder: Path, train: Dataset) -> Any:
    setfit = import_module("setfit")
    torch.manual_seed(SEED)
    model = setfit.SetFitModel.from_pretrained(str(folder), local_files_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        settings = setfit.TrainingArguments(
            output_dir=scratch,
            batch_size=BATCH,
            num_epochs=EPOCHS,
            seed=SEED,
            report_to="none",
            save_strategy="no",
            show_progress_bar=False,
        )
        trainer = setfit.Trainer(model=model, args=settings, train_dataset=train)
        for talk in (PrinterCallback, ProgressCallback):  # `show_progress_bar` leaves one in
            trainer.pop_callback(talk)
        trainer.train()
    return model


def _predict(model: Any, texts: Sequence[str]) -> Values:
    return np.asarray(model.predict(list(texts), as_numpy=True, show_progress_bar=False)).astype(
        int
    )
