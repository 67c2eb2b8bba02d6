"""What an export is given, what it returns, and how a library's model is compared."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unipelt_cli.errors import CheckError, UnipeltError
from unipelt_cli.exports.parity import TOLERANCE, Parity, compare
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.probe import probe_rows
from unipelt_cli.runs.run import Run, copied

ROWS = 256


@dataclass(frozen=True)
class Rows:
    """What two models are compared on: test rows of the run first, then seeded random tokens."""

    encoded: Encoded
    from_test: int


@dataclass(frozen=True)
class Job:
    """A run to write, and where it will be; `tuned` computes in float32 on the CPU."""

    run: Run
    tuned: TunedModel
    rows: Rows
    directory: Path
    part: str | None = None
    """The one part of a union that is asked for, though it is not the same model."""
    half: bool = False
    """Whether numbers are written as float16."""

    def copy(self, *, accelerate: bool = True) -> TunedModel:
        """Build the model once more, for a writer that changes it."""
        return copied(self.run, self.tuned, accelerate=accelerate)


@dataclass(frozen=True)
class Written:
    """What a writer has to say: its check, what the user must know, and code that loads it."""

    parity: Parity
    notes: Sequence[str]
    snippet: str
    tolerance: float = TOLERANCE
    """Of logits in the unit of the run's label scale."""
    compares_logits: bool = True
    """Or hidden states, where the library has no head for the model."""


Writer = Callable[[Path], Written]


def find_rows(run: Run, tuned: TunedModel, source: str | None = None) -> Rows:
    """Return 256 rows: the run's first test rows where they are found again, else random ones."""
    longest, pad_to = run.experiment.model.max_length, None
    if tuned.method.pads_to_max_length:
        pad_to = longest
    texts = 1 + tuned.classifier.apart[0]
    try:
        test_rows = run.rows("test", source)
        chosen = test_rows.select(range(min(ROWS, len(test_rows))))
        test = encode_rows(tuned, [chosen[column] for column in run.task.text], longest)
    except UnipeltError:  # the source is not there, or not the same
        test = Encoded([], [], tuned.tokenizer.pad_token_id, texts=texts)
    drawn = probe_rows(tuned, ROWS - len(test), longest, texts)
    both = replace(test.with_rows(drawn), pad_id=drawn.pad_id, pad_to=pad_to)
    return Rows(both, len(test))


def compare_library(
    job: Job, batches: Iterator[list[int]], model: Any, *, has_head: bool
) -> Parity:
    """Compare with a model of a library by its logits, or by hidden states if it has no head."""
    rows, classifier = job.rows.encoded, job.tuned.classifier
    if has_head:
        return compare(rows, batches, classifier, lambda **inputs: model(**inputs).logits)

    def read(hidden: Any, mask: Tensor) -> Tensor:
        return classifier.read(classifier.features_of_states(hidden, mask))

    ours, theirs = (
        _states_by_text(backbone, rows.texts) for backbone in (classifier.backbone, model)
    )
    return compare(rows, batches, ours, theirs, read)


def _states_by_text(model: Any, texts: int) -> Callable[..., Tensor]:
    """Return what gives a model's last hidden states, the first texts of rows passed by themselves.

    So are the second ones: side by side they would be padded to one length, where a tool for which
    padding matters answers otherwise.
    """

    def states(**inputs: Tensor) -> Tensor:
        length, each = inputs["attention_mask"].shape[1], []
        for text_index in range(texts):
            of_text = {name: tensor.chunk(texts)[text_index] for name, tensor in inputs.items()}
            longest = length if texts == 1 else int(of_text["attention_mask"].sum(1).max())
            cut = {name: tensor[:, :longest] for name, tensor in of_text.items()}
            hidden = model(**cut).last_hidden_state
            each.append(functional.pad(hidden, (0, 0, 0, length - longest)))
        return torch.cat(each)

    return states


def labelled_config(run: Run, tuned: TunedModel) -> Any:
    """Return the backbone's config of the transformers library, with the task's labels in it."""
    config, labels = tuned.pretrained.library_config(), run.task.labels
    config.num_labels = run.task.outputs
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification" if labels else "regression"
    return config


def disagreement(tool: str, tensor: str) -> CheckError:
    """Return the error for a tensor that a tool did not read as it was written."""
    return CheckError(
        f"{tool} and the export disagree about the tensor {tensor}",
        "this is a bug in unipelt: please report it with the run's experiment.toml",
    )
