"""What the floor of all methods gives on a run's rows, for the run to be set beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unipelt_cli import methods
from unipelt_cli.backbones.pretrained import Pretrained
from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.data.folds import assign_folds, fold_of
from unipelt_cli.data.prepared_directory import Prepared
from unipelt_cli.errors import BackboneError, CheckError, RunError
from unipelt_cli.metrics import Values
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import predictions, references
from unipelt_cli.system import memory
from unipelt_cli.tasks import joint_scores
from unipelt_cli.training.heads.frozen_features import read_features
from unipelt_cli.training.planning import RowCache, loop_of

_ROWS = ("seed", "device", "precision", "label_scale")  # settings of `train` that it shares


def beside(
    experiment: Experiment, prepared: Sequence[Prepared], pretrained: Pretrained, shared: RowCache
) -> Mapping[str, Any]:
    """Return, for a run's result, the floor's scores on its rows by split, or why there are none.

    It is fitted to the run's train rows on a backbone of its own, once for each set of rows. A
    floor that does not fit into memory, or cannot be, is left out: no run is lost for it. Nothing
    for a run of the floor itself.
    """
    if experiment.method_name == methods.FLOOR:
        return {}
    floor = _experiment(experiment)
    key = _key(floor, prepared, pretrained)
    if key not in shared.floors:
        shared.floors[key] = _guarded(floor, prepared, pretrained, shared)
    return shared.floors[key]


def _experiment(experiment: Experiment) -> Experiment:
    """Return the floor's experiment: the run's rows and backbone, the floor's own head."""
    settings, recipe = experiment.settings(), methods.get(methods.FLOOR)
    model = {
        key: value
        for key, value in settings["model"].items()
        if key not in recipe.settings.get("model", {})
    }
    train = {key: settings["train"][key] for key in _ROWS}
    layer = {"data": settings["data"], "model": model, "train": train}
    return resolve([("", {**layer, "method": {"name": methods.FLOOR}})])


def _key(floor: Experiment, prepared: Sequence[Prepared], pretrained: Pretrained) -> str:
    """Return what the floor's scores depend on."""
    digests = [
        [dataset.manifest["splits"][split]["digest"] for split in dataset.splits]
        for dataset in prepared
    ]
    folds = [dataset.manifest.get("folds") for dataset in prepared]
    rows = [dataset.task for dataset in prepared], digests, folds
    settings = floor.settings()
    return repr((pretrained.fingerprint, rows, settings["model"], settings["train"]))


def _guarded(
    floor: Experiment, prepared: Sequence[Prepared], pretrained: Pretrained, shared: RowCache
) -> Mapping[str, Any]:
    try:
        return {methods.FLOOR: _scores(floor, prepared, pretrained, shared)}
    except (BackboneError, CheckError, RunError) as error:
        reason = error.message
    except (RuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        reason = "it does not fit into memory"
    memory.release()
    return {f"no_{methods.FLOOR}": reason}


def _scores(
    floor: Experiment, prepared: Sequence[Prepared], pretrained: Pretrained, shared: RowCache
) -> dict[str, dict[str, float]]:
    """Return the floor's scores by split; where folds are tested, those of their rows together."""
    if folds := prepared[0].manifest.get("folds", 0) if "test" not in prepared[0].splits else 0:
        (whole,) = prepared
        expected = references(whole.splits["train"])
        places = assign_folds(whole.task, whole.splits["train"], folds, whole.manifest["data_seed"])
        pooled = np.zeros_like(expected)
        for fold in range(folds):
            (predicted,), _ = _answers(floor, [fold_of(whole, fold + 1)], pretrained, shared)
            pooled[places == fold] = predicted
        return {"test": whole.task.score(pooled, expected)}
    answers, dev = _answers(floor, prepared, pretrained, shared)
    test = [
        dataset.task.score(predicted, references(dataset.splits["test"]))
        for dataset, predicted in zip(prepared, answers, strict=True)
    ]
    scores = joint_scores([dataset.task for dataset in prepared], test)
    return {**({"dev": dev} if dev else {}), "test": scores}


def _answers(
    floor: Experiment, prepared: Sequence[Prepared], pretrained: Pretrained, shared: RowCache
) -> tuple[list[Values], dict[str, float]]:
    """Fit the floor; return each task's predictions on test, and its scores on dev."""
    tasks = [dataset.task for dataset in prepared]
    outputs, pairs = [task.outputs for task in tasks], [task.is_pair for task in tasks]
    tuned = build(floor, outputs, pretrained, pairs=pairs)
    loop = loop_of(floor, prepared, tuned, shared)
    for _ in loop.events():
        pass
    answers = []
    for task_index, dataset in enumerate(prepared):
        features = shared.features(tuned, dataset, task_index, "test", floor)
        answers.append(predictions(dataset.task, read_features(tuned, features, task_index)))
    return answers, dict(loop.progress.best_dev)
