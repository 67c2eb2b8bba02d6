"""Run directories made up without training, for whatever compares them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.command import invoke
from support.runs import reseal

from unipelt_cli.config import toml
from unipelt_cli.config.experiment import resolve
from unipelt_cli.files import atomic, sealed
from unipelt_cli.runs.names import (
    ENVIRONMENT,
    EXPERIMENT,
    METRICS,
    MODEL,
    PREDICTIONS,
    PROBE,
    RESULT,
)
from unipelt_cli.tasks import TASKS, Task


def forge_answers(task: Task, score: float, seed: int, collapsed: bool) -> tuple[Any, Any]:
    """Make predictions that are right as often as `score` says, on the rows that a task has."""
    drawn = np.random.default_rng(seed)
    expected = np.random.default_rng(0).integers(0, max(2, task.outputs), ROWS)
    if collapsed:
        return np.zeros(ROWS, dtype=np.int64), expected
    wrong = drawn.permutation(ROWS)[: round((1 - score) * ROWS)]
    predicted = expected.copy()
    predicted[wrong] = (predicted[wrong] + 1) % task.outputs
    return predicted, expected


def forge(
    directory: Path,
    method: str,
    score: float,
    task: str = "sst2",
    k: int | None = 100,
    seed: int = 111,
    backbone: str = "bert-base-uncased",
    digest: str = "",
    collapsed: bool = False,
    stores_predictions: bool = True,
    seconds: float = 10.0,
    **settings: dict[str, Any],
) -> Path:
    """Write a finished run that nobody trained: its files agree with each other."""
    directory.mkdir(parents=True)
    given = {"data": {"task": task, "data_seed": seed}, "model": {"backbone": backbone}}
    if k is not None:
        given["data"]["k"] = k
    method_settings = {"name": method, **settings.pop("options", {})}
    layers = [("", given), ("", {"method": method_settings}), ("", settings)]
    planned = resolve(layers)
    own = TASKS[task]
    predicted, expected = forge_answers(own, score, seed, collapsed)
    told = {key: getattr(own, key) for key in ("name", "text", "labels", "metric", "also")}
    splits = {name: {"digest": digest or f"{task} {name}"} for name in ("train", "dev", "test")}
    (directory / EXPERIMENT).write_text(toml.dump(planned))
    atomic.write_json(
        directory / ENVIRONMENT,
        {
            **{"threads": 1, "packages": {}, "data": {"splits": splits, "source": {}}},
            "backbone": {
                **{"name": backbone, "revision": None, "files": {}},
                "fingerprint": f"{backbone}-fingerprint",
            },
        },
    )
    sealed.write_tensors(directory / PROBE, {"logits": torch.zeros(1)}, {"rows": 1})
    (directory / METRICS).write_text("")
    sealed.write_tensors(directory / MODEL, {"x": torch.zeros(1)}, {"task": told})
    if stores_predictions:
        pair = {"predictions.0": predicted, "references.0": expected}
        tensors = {name: torch.from_numpy(values).int() for name, values in pair.items()}
        sealed.write_tensors(directory / PREDICTIONS, tensors, {"split": "test"})
    scores = own.score(predicted, expected)
    count = {"lora": 294_912, "full": 109_482_240}.get(method, 1_401_444)
    atomic.write_json(
        directory / RESULT,
        {
            **{"metric": own.metric, "dev": scores, "test": scores, "seconds": seconds},
            **{"device": "cpu", "best_epoch": 1, "epochs": 1, "artifact_bytes": 1},
            **{"trainable_parameters": count, "stored_parameters": count, "head_parameters": 1538},
            **{"peak_memory_bytes": 2**30, "collapsed": collapsed},
        },
    )
    reseal(directory)
    return directory


def forge_grid(
    root: Path, scores: dict[str, float], tasks: tuple[str, ...] = ("sst2",), **more: Any
) -> Path:
    """Write runs of methods on tasks with five seeds each; a seed moves all methods alike."""
    for task in tasks:
        for place, (method, score) in enumerate(scores.items()):
            for seed in SEEDS:
                moved = score + (seed % 7) * 0.005 + (seed // 111 * (place + 1) % 3) * 0.005
                forge(root / f"{task}-{method}-{seed}", method, moved, task, seed=seed, **more)
    return root


def answer_of(*arguments: object) -> dict[str, Any]:
    code, stdout, stderr = invoke("compare", *arguments, "--json")
    assert code == 0, stderr
    return dict(json.loads(stdout))


SEEDS = (111, 222, 333, 444, 555)
ROWS = 200
