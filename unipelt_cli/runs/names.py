"""The names of a run's directory and of the files in it."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unipelt_cli.config.experiment import Experiment

EXPERIMENT, ENVIRONMENT, PROBE = "experiment.toml", "environment.json", "probe.safetensors"
METRICS, MODEL, PREDICTIONS, RESULT, STATE = (
    "metrics.jsonl",
    "model.safetensors",
    "predictions.safetensors",
    "result.json",
    "state.safetensors",
)
FOLDS = "folds"
RECORDED = (EXPERIMENT, ENVIRONMENT, PROBE, METRICS, MODEL, PREDICTIONS)
"""The files whose hashes the result holds; runs of earlier versions have no predictions."""


def fold_directory(directory: Path, fold: int) -> Path:
    """Return where a run keeps one of its folds, from 1, until it is finished."""
    return directory / FOLDS / f"fold-{fold}"


def run_name(experiment: "Experiment") -> str:
    """Return what a run directory is called if nobody says so."""
    data, train = experiment.data, experiment.train
    source = data.train_file or data.dataset or str(data.prepared or "data")
    task = "+".join(data.tasks or ()) or data.task or Path(source).stem
    backbone = Path(experiment.model.backbone).name
    name = (
        f"{task}-k{data.k or 'all'}-{experiment.method_name}-{backbone}"
        f"-d{data.data_seed}-s{train.seed}"
    )
    return re.sub(r"[^\w.-]+", "-", name)
