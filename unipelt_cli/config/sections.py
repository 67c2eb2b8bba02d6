"""The sections of an Experiment and their settings: types, defaults, bounds, help."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Settings = dict[str, dict[str, Any]]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Pooling = Literal["auto", "native", "cls", "mean", "eos"]
Pairs = Literal["auto", "joint", "apart"]
Scale = Literal["auto", "standardised", "raw"]
MOST_FOLDS = 20
HeadStart = Literal["random", "means"]
HeadEnd = Literal["trained", "means"]
Metric = Literal["accuracy", "f1", "macro_f1", "matthews", "spearman", "pearson", "mse"]


def split_names(value: Any) -> Any:
    """Take "a,b" and TOML's lists as tuples of names; what is wrong stays for the check."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


def read_folds(value: Any) -> Any:
    """Take "none" and numbers in words as numbers; raise ValueError for what is no number of folds.

    One fold would be all rows, and test none of them.
    """
    if value == "auto":
        return value
    number = {"none": 0}.get(value, value) if isinstance(value, str) else value
    if isinstance(number, str) and number.isascii() and number.isdigit():
        number = int(number)
    if type(number) is not int or number not in (0, *range(2, MOST_FOLDS + 1)):
        raise ValueError(f"2 to {MOST_FOLDS}, none, or auto")
    return number


Folds = Annotated[int | Literal["auto"], BeforeValidator(read_folds)]
Names = Annotated[tuple[str, ...], BeforeValidator(split_names)]
Directories = Annotated[
    str | tuple[str, ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]


class Section(BaseModel):
    """One table of the experiment file: frozen, strict, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class DataSettings(Section):
    """Which rows: tasks of the table, a hub data set, or files of the user's own."""

    task: str | None = Field(None, description="a task of the table, or a name for your own data")
    tasks: Names | None = Field(None, description="several tasks of the table, trained at once")
    k: Annotated[int, Field(ge=1)] | None = Field(None, description="train rows; all without it")
    data_seed: int = Field(111, ge=0, lt=2**63, description="draws the rows")
    dev_size: int = Field(
        1000, ge=0, lt=2**63, description="dev rows, drawn after the train rows; 0: no dev set"
    )
    folds: Folds = Field(
        "auto",
        description="so many parts of the train rows are each tested by training on the others; "
        "auto: small files without dev rows choose, all else has none",
    )
    fold: Annotated[int, Field(ge=1, le=MOST_FOLDS)] | None = Field(
        None, description="train on all folds but this one, and test on it"
    )
    source: str | None = Field(None, description="a directory in GLUE's layout, or 'hub'")
    prepared: Directories | None = Field(
        None, description="a directory that `prepare` wrote, or one for each of several tasks"
    )
    dataset: str | None = Field(None, description="a hub data set, NAME or NAME:CONFIG")
    train_file: str | None = Field(
        None, description="own rows: .csv, .tsv, .jsonl, .json or .parquet"
    )
    dev_file: str | None = Field(None, description="own dev rows")
    test_file: str | None = Field(None, description="own test rows")
    encoding: str | None = Field(
        None, description="of own text files; their byte-order mark says it, else it is UTF-8"
    )
    text: str | None = Field(None, description="the text column")
    text_pair: str | None = Field(None, description="the second text column of a pair")
    label: str | None = Field(None, description="the label column")
    kind: Literal["auto", "classification", "regression"] = Field(
        "auto", description="what own labels are; auto: names of classes repeat, values do not"
    )
    metric: Metric | None = Field(None, description="what selects the best epoch of own data")
    positive: str | None = Field(
        None, description="the label that F1 is of, of two; own data: the rarer one without it"
    )
    skip_unusable: bool | None = Field(
        None, description="true leaves out own rows without a text or label, and counts them"
    )

    def with_folds(self) -> "DataSettings":
        """Return the settings with what `auto` becomes where no look at the rows is needed.

        What a file's size decides, and what a prepared directory was drawn with, stays open.
        """
        if self.folds not in ("auto", 0):
            return self.model_copy(update={"dev_size": 0})
        names_size = "dev_size" in self.model_fields_set and "folds" not in self.model_fields_set
        is_open = self.prepared or (self.train_file and not self.dev_file and not names_size)
        return self if is_open else self.model_copy(update={"folds": 0})

    @property
    def has_dev(self) -> bool:
        """Whether there are dev rows; of settings whose folds are not open any more."""
        return bool(self.dev_file or self.dev_size)

    def each(self) -> tuple["DataSettings", ...]:
        """Return every task's settings as if it were alone: its rows are drawn by them."""
        directories = self.prepared if isinstance(self.prepared, tuple) else None
        count = len(self.tasks or directories or (self.task,))
        names = self.tasks or (self.task,) * count
        places = directories or (self.prepared,) * count
        return tuple(
            self.model_copy(update={"task": name, "tasks": None, "prepared": directory})
            for name, directory in zip(names, places, strict=True)
        )

    def moved(self, source: str) -> "DataSettings":
        """Return the settings with the rows at `source`: files and directories keep their names."""
        folder = Path(source)
        changes: dict[str, Any] = {
            key: str(folder / Path(path).name)
            for key in ("train_file", "dev_file", "test_file")
            if (path := getattr(self, key)) is not None
        }
        if isinstance(self.prepared, tuple):
            changes["prepared"] = tuple(str(folder / Path(path).name) for path in self.prepared)
        elif not changes and (folder / "manifest.json").is_file():
            changes = {"prepared": source, "source": None}
        elif not changes:
            changes = {"prepared": None, "source": source}
        return self.model_copy(update=changes)


class ModelSettings(Section):
    """The frozen backbone and how a row's features are read from it."""

    backbone: str = Field("minilm", min_length=1, description="a directory, a hub name, or minilm")
    pooling: Pooling = Field("auto", description="what the head reads")
    normalise: bool = Field(
        False, description="whether the head reads features of length 1, as cosines are made of"
    )
    pairs: Pairs = Field(
        "auto",
        description="two texts in one row (joint), or each by itself and compared (apart); auto: "
        "apart where the backbone's own folder says that it is a sentence encoder",
    )
    head_dropout: float = Field(0.1, ge=0, le=0.9, description="dropout before the head")
    max_length: int = Field(128, ge=8, le=512, description="tokens a row is cut to")
    attention: Literal["auto", "eager", "sdpa"] = Field("auto", description="implementation")


class TrainSettings(Section):
    """The loop: AdamW, linear schedule, early stopping on dev."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="peak rate; the method's own without it"
    )
    epochs: int = Field(50, ge=1, description="at most so many")
    patience: int = Field(10, ge=1, description="epochs without a better dev score before the end")
    patience_steps: int = Field(0, ge=0, description="and at least so many steps without one")
    batch_size: int = Field(16, ge=1, description="rows a step")
    head_rate: float = Field(1.0, gt=0, le=1000, description="head: factor on the rate")
    balanced: bool = Field(
        False, description="whether a batch has as many rows of every class; rare ones come again"
    )
    rows_per_class: int = Field(
        1,
        ge=1,
        description="of how many classes a balanced batch has rows, where it is too small for all: "
        "of so few that each has so many rows",
    )
    contrast: float = Field(
        0.0,
        ge=0,
        le=100,
        description="weight of a term that draws rows of one label together, others apart, among "
        "those computed at a time",
    )
    head_start: HeadStart = Field(
        "random", description="where a head over classes starts: drawn, or at their mean features"
    )
    head_end: HeadEnd = Field(
        "trained",
        description="how a head over classes ends: as trained, or at the mean features of its "
        "train rows as tuned (over pairs apart: fitted to them), unless dev prefers the trained",
    )
    averaging: float = Field(
        0.0, ge=0, lt=1, description="dev scores and keeps a running mean of the tensors; its decay"
    )
    label_scale: Scale = Field(
        "auto",
        description="regression: learn labels as they are (raw), or less the train rows' mean and "
        "over their deviation; auto: raw within 0 to 5, or nearly",
    )
    warmup: float = Field(0.06, ge=0, lt=1, description="share of all steps that warm up")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's, on matrices only")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    seed: int = Field(42, ge=0, lt=2**63, description="initialises, shuffles and drops out")
    device: Device = Field("auto", description="where to compute")
    precision: Precision = Field("auto", description="auto: bf16 where the hardware is fast at it")


SECTIONS: Mapping[str, type[Section]] = {
    "data": DataSettings,
    "model": ModelSettings,
    "train": TrainSettings,
}
