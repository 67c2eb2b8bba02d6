"""The table of tasks: which columns hold text, what the labels are, what is scored.

A task of the user's own is the same value, built by `data.sources` from the files and columns that
are given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from unipelt_cli.errors import ConfigError, nearest
from unipelt_cli.metrics import METRICS, Values


@dataclass(frozen=True)
class Task:
    """What one kind of labelled rows looks like and how predictions on them are judged.

    `labels` is empty for regression. `metric` selects checkpoints; `also` is reported beside it.
    `positive` is the label, of two, that F1 is of: the second one where it is None.
    `decimal_comma` says how a regression's labels are spelled in their files.
    """

    name: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str
    also: tuple[str, ...] = ()
    dev_size: int = 1000
    source: "Glue | Packaged | None" = None
    positive: str | None = None
    decimal_comma: bool = False

    @property
    def positive_label(self) -> str | None:
        """The label that F1 is of; None where there are not two."""
        if len(self.labels) != 2:
            return None
        return self.labels[1] if self.positive is None else self.positive

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def is_pair(self) -> bool:
        """Whether a row has two texts."""
        return len(self.text) == 2

    @property
    def outputs(self) -> int:
        """How many numbers the head gives for one row."""
        return len(self.labels) or 1

    def score(self, predictions: Values, references: Values) -> dict[str, float]:
        """Score label indices (or values, in regression): the task's metric first."""
        answers = self.positive_last(predictions), self.positive_last(references)
        return {name: METRICS[name](*answers, self.outputs) for name in (self.metric, *self.also)}

    def positive_last(self, values: Values) -> Values:
        """Return two labels' indices so that 1 is the one that F1 is of; others as they are."""
        positive = self.positive_label
        is_first = positive is not None and self.labels.index(positive) == 0
        return 1 - values if is_first else values


@dataclass(frozen=True)
class Glue:
    """Where a task of GLUE lies: in GLUE's own directory layout, and on the hub.

    `columns` are the text columns of the local file (indices where it has no header),
    `values` its label values in the order of `Task.labels`.
    """

    folder: str
    columns: tuple[str, ...] | tuple[int, ...]
    label: str | int
    values: tuple[str, ...]
    hub_columns: tuple[str, ...]
    dev: str = "dev"
    hub_dev: str = "validation"


@dataclass(frozen=True)
class Packaged:
    """A data set that is shipped inside the package: its folder."""

    folder: str


HUB_GLUE = "nyu-mll/glue"


MEAN = "mean"


def joint_name(tasks: Sequence[Task]) -> str:
    """Return what tasks that train one backbone are called: their names, joined."""
    return "+".join(task.name for task in tasks)


def joint_metric(tasks: Sequence[Task]) -> str:
    """Return what selects the best epoch: a task's own metric, or the mean over several."""
    return tasks[0].metric if len(tasks) == 1 else MEAN


def joint_scores(tasks: Sequence[Task], scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return one task's scores; of several the mean of their metrics, and all by "task.metric"."""
    if len(tasks) == 1:
        return dict(scores[0])
    pairs = list(zip(tasks, scores, strict=True))
    mean = sum(of_task[task.metric] for task, of_task in pairs) / len(pairs)
    named = {f"{task.name}.{name}": of_task[name] for task, of_task in pairs for name in of_task}
    return {MEAN: mean, **named}


def joint_positive(tasks: Sequence[Task]) -> dict[str, str | dict[str, str]]:
    """Return what is recorded of the labels that F1 is of, where it is scored or was chosen."""
    labels = {
        task.name: task.positive_label
        for task in tasks
        if task.positive_label is not None
        and (task.positive is not None or "f1" in (task.metric, *task.also))
    }
    if not labels:
        return {}
    return {"positive": labels if len(tasks) > 1 else next(iter(labels.values()))}


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(
                "demo",
                ("sentence",),
                ("cancel", "change", "fault", "how_to", "refund", "status"),
                "accuracy",
                ("f1",),
                dev_size=200,
                source=Packaged("demo"),
            ),
            Task(
                "cola",
                ("sentence",),
                ("unacceptable", "acceptable"),
                "matthews",
                ("accuracy",),
                source=Glue("CoLA", (3,), 1, ("0", "1"), ("sentence",)),
            ),
            Task(
                "sst2",
                ("sentence",),
                ("negative", "positive"),
                "accuracy",
                source=Glue("SST-2", ("sentence",), "label", ("0", "1"), ("sentence",)),
            ),
            Task(
                "mrpc",
                _PAIR,
                ("not_equivalent", "equivalent"),
                "f1",
                ("accuracy",),
                source=Glue("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), _PAIR),
            ),
            Task(
                "stsb",
                _PAIR,
                (),
                "spearman",
                ("pearson", "mse"),
                source=Glue("STS-B", _PAIR, "score", (), _PAIR),
            ),
            Task(
                "qqp",
                _PAIR,
                ("not_duplicate", "duplicate"),
                "f1",
                ("accuracy",),
                source=Glue(
                    "QQP",
                    ("question1", "question2"),
                    "is_duplicate",
                    ("0", "1"),
                    ("question1", "question2"),
                ),
            ),
            Task(
                "mnli",
                _PAIR,
                ("entailment", "neutral", "contradiction"),
                "accuracy",
                source=Glue(
                    "MNLI",
                    _PAIR,
                    "gold_label",
                    ("entailment", "neutral", "contradiction"),
                    ("premise", "hypothesis"),
                    dev="dev_matched",
                    hub_dev="validation_matched",
                ),
            ),
            Task(
                "qnli",
                _PAIR,
                _ENTAILMENT,
                "accuracy",
                source=Glue(
                    "QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("question", "sentence")
                ),
            ),
            Task(
                "rte",
                _PAIR,
                _ENTAILMENT,
                "accuracy",
                source=Glue("RTE", _PAIR, "label", _ENTAILMENT, _PAIR),
            ),
        )
    }
)


def get_task(name: str) -> Task:
    """Return the task called `name`; raise ConfigError with the nearest name if there is none."""
    if name not in TASKS:
        hint = nearest(name, TASKS)
        if "," in name and all(part in TASKS for part in name.split(",")):
            hint = f"write --tasks {name} to train one model on them all"
        elif name.endswith((".csv", ".tsv", ".jsonl", ".parquet")):
            hint = f"write --train-file {name} for rows of your own"
        raise ConfigError(f"data.task = {name!r}: no such task", hint)
    return TASKS[name]


def own_metric(labels: Sequence[str]) -> str:
    """Return the default metric of a task of the user's own."""
    return "accuracy" if labels else "spearman"
