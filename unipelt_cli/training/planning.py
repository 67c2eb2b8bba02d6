"""Everything a run needs before its first step: rows, model and loop."""

from collections.abc import Mapping, Sequence
from typing import Any

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data import preparation
from unipelt_cli.data.folds import fold_of
from unipelt_cli.data.own_files import OwnFiles
from unipelt_cli.data.prepared_directory import Prepared
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import Features, compute_features, encode_rows, references
from unipelt_cli.models.label_scale import RAW, LabelScale
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.system import memory
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.training.events import TaskRows
from unipelt_cli.training.loop import Training


class RowCache:
    """Rows drawn and tokenized once for all runs of a process that read the same ones.

    It is let go with the runs it was made for: files are taken to stay as they are meanwhile.
    """

    def __init__(self, most: int = 16, files: OwnFiles | None = None) -> None:
        self.most, self.files = most, files or OwnFiles()
        self._prepared: dict[DataSettings, Prepared] = {}
        self._encoded: dict[tuple[Any, ...], Encoded] = {}
        self._features: dict[tuple[Any, ...], Features] = {}
        self.floors: dict[str, Mapping[str, Any]] = {}
        """What the floor scored, by rows and backbone: see `training.floor`."""

    def prepare(self, settings: DataSettings) -> tuple[Prepared, ...]:
        """Draw each task's rows, or take those that were drawn before."""
        if settings.fold is not None:  # of rows that are drawn once for all folds
            whole = self.prepare(settings.model_copy(update={"fold": None}))
            return tuple(fold_of(dataset, settings.fold) for dataset in whole)
        if any(chosen not in self._prepared for chosen in settings.each()):
            drawn = preparation.prepare_each(settings, self.files)
            self.keep(settings, drawn)
        datasets = tuple(self._prepared[chosen] for chosen in settings.each())
        _drop_oldest(self._prepared, self.most)
        return datasets

    def keep(self, settings: DataSettings, prepared: Sequence[Prepared]) -> None:
        """Take rows as those of these settings too, which say what was decided about them."""
        if settings.fold is None:
            self._prepared |= zip(settings.each(), prepared, strict=True)

    def encode(
        self, tuned: TunedModel, dataset: Prepared, split: str, experiment: Experiment
    ) -> Encoded:
        """Tokenize the text columns of a split, or take what was made of them before."""
        task, limit = dataset.task, experiment.model.max_length
        digest = dataset.manifest["splits"][split]["digest"]
        padded = tuned.method.pads_to_max_length
        key = (tuned.pretrained.fingerprint, digest, limit, tuned.pairs, padded, *task.text)
        if key not in self._encoded:
            columns = [dataset.splits[split][column] for column in task.text]
            self._encoded[key] = encode_rows(tuned, columns, limit)
        encoded = self._encoded[key]
        _drop_oldest(self._encoded, 3 * self.most)
        return encoded

    def features(
        self,
        tuned: TunedModel,
        dataset: Prepared,
        task_index: int,
        split: str,
        experiment: Experiment,
        processes: Processes = ALONE,
    ) -> Features:
        """Send a split through a frozen backbone, or take what it gave for these rows before."""
        model = experiment.model.model_dump(exclude={"backbone", "normalise", "head_dropout"})
        key = (
            tuned.pretrained.fingerprint,
            tuned.pooling,
            tuned.precision,
            str(tuned.device),
            repr(model),
            dataset.manifest["splits"][split]["digest"],
            dataset.task.text,
            # What an untrained pooler gives depends on the seed, what a task reads on its place.
            (experiment.train.seed, task_index) if tuned.untrained else None,
            processes.count,
        )
        if key not in self._features:
            rows = self.encode(tuned, dataset, split, experiment)
            self._features[key] = compute_features(tuned, rows, task_index, processes)
        features = self._features[key]
        _drop_oldest(self._features, 3 * self.most)
        return features


def _drop_oldest(kept: dict[Any, Any], most: int) -> None:
    for key in list(kept)[:-most]:
        del kept[key]


def with_drawn_rows(experiment: Experiment) -> Experiment:
    """Write what prepared directories were drawn with into the experiment that uses them.

    Raises DataError when the experiment's own settings contradict it.
    """
    if experiment.data.prepared is None:
        return experiment
    manifests = preparation.read_drawn(experiment.data)
    drawn = {key: manifests[0][key] for key in ("task", "k", "data_seed", "dev_size")}
    drawn["folds"] = manifests[0].get("folds", 0)
    if len(manifests) > 1:
        del drawn["task"]
        drawn["tasks"] = tuple(manifest["task"] for manifest in manifests)
    if all(getattr(experiment.data, key) == value for key, value in drawn.items()):
        return experiment
    return experiment.with_("data", **drawn)


def plan(
    experiment: Experiment, shared: RowCache | None = None
) -> tuple[Experiment, tuple[Prepared, ...], TunedModel]:
    """Prepare each task's data, build the model, and write what was chosen into the experiment."""
    shared = shared or RowCache()
    prepared = shared.prepare(experiment.data)
    tasks = [dataset.task for dataset in prepared]
    outputs, pairs = [task.outputs for task in tasks], [task.is_pair for task in tasks]
    tuned = build(experiment, outputs, pairs=pairs)
    drawn = dict[str, str | int]()
    if experiment.data.train_file or experiment.data.dataset:
        is_regression = prepared[0].task.is_regression
        drawn["kind"] = "regression" if is_regression else "classification"
    if experiment.data.folds == "auto":
        manifest = prepared[0].manifest
        drawn |= {"folds": manifest.get("folds", 0), "dev_size": manifest["dev_size"]}
    is_open = experiment.train.label_scale == "auto"
    scale = _label_scale(prepared) if is_open else None
    experiment = experiment.with_("data", **drawn)
    shared.keep(experiment.data, prepared)
    experiment = experiment.with_("model", pooling=tuned.pooling, pairs=tuned.pairs)
    experiment = experiment.with_("train", precision=tuned.precision, label_scale=scale)
    return experiment, prepared, tuned


def _label_scale(prepared: Sequence[Prepared]) -> str:
    """Return what `auto` becomes; it stays where several regressions need different ones."""
    regressions = [dataset for dataset in prepared if dataset.task.is_regression]
    scales = [LabelScale.chosen(references(dataset.splits["train"])) for dataset in regressions]
    names = {"raw" if scale == RAW else "standardised" for scale in scales}
    return "auto" if len(names) > 1 else next(iter(names), "raw")


def loop_of(
    experiment: Experiment,
    prepared: Sequence[Prepared],
    tuned: TunedModel,
    shared: RowCache,
    processes: Processes = ALONE,
) -> Training:
    """Make the loop over what `plan` returned."""
    courses = []
    for dataset in prepared:
        train, dev = (
            (shared.encode(tuned, dataset, split, experiment), references(dataset.splits[split]))
            if split in dataset.splits
            else None
            for split in ("train", "dev")
        )
        assert train is not None
        courses.append(TaskRows(dataset.task, train, dev))
    first, *more = courses

    def source(tuned: TunedModel, task_index: int, split: str) -> Features:
        dataset = prepared[task_index]
        return shared.features(tuned, dataset, task_index, split, experiment, processes)

    return Training(
        tuned, first.task, first.train, first.dev, experiment.train, more, processes, source
    )


def doubt(training: Training) -> str | None:
    """Say where the longest rows may not fit into memory as one batch."""
    tuned = training.tuned
    batch = longest_batch(training)
    return memory.doubt(*batch, tuned.classifier.backbone.config, tuned.device)


def longest_batch(training: Training) -> tuple[int, int]:
    """Return the texts and the tokens a text of the longest batch that there can be."""
    encoded = (course.train[0] for course in training.courses)
    rows = max(encoded, key=lambda rows: max(rows.widths))
    count = rows.texts * min(training.settings.batch_size, len(rows))
    return count, int(rows.text_lengths.max())
