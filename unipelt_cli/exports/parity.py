"""What all exports share: the model to write, the rows to compare on, and how far it may be off.

A format's module has one function `plan`, which refuses what the format cannot hold and returns
the function that writes: so nothing is written for a refusal.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from unipelt_cli.errors import CheckError, UnipeltError
from unipelt_cli.models import build
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.build import Tuned
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.runs.run import Run, probe_rows

ROWS = 256
TOLERANCE = 1e-4
SIZES = (1, 3, 32, 8)  # of the batches for a tool where padding must not matter
CPU = torch.device("cpu")

Parity = dict[str, Any]
Model = Callable[..., Tensor]
"""From a batch's tensors by name to its logits (batch, outputs), or hidden states."""


@dataclass(frozen=True)
class Rows:
    """What two models are compared on: test rows of the run first, then seeded random tokens."""

    encoded: Encoded
    from_test: int


@dataclass(frozen=True)
class Job:
    """A run to write, and where it will be; `tuned` computes in float32 on the CPU."""

    run: Run
    tuned: Tuned
    rows: Rows
    directory: Path
    part: str | None = None
    """The one part of a union that is asked for, though it is not the same model."""
    half: bool = False
    """Whether numbers are written as float16."""

    def copy(self, *, hasten: bool = True) -> Tuned:
        """Build the model once more, for a writer that changes it."""
        return copied(self.run, self.tuned, hasten=hasten)


@dataclass(frozen=True)
class Written:
    """What a writer has to say: its check, what the user must know, and code that loads it."""

    parity: Parity
    notes: Sequence[str]
    snippet: str
    tolerance: float = TOLERANCE


Writer = Callable[[Path], Written]


def copied(run: Run, tuned: Tuned, *, hasten: bool = True) -> Tuned:
    """Build a model once more, in float32 on the CPU."""
    experiment = run.experiment.replace("train", device="cpu", precision="fp32")
    if not hasten:
        experiment = experiment.replace("model", attention="auto")  # plain, on a CPU
    copy = build.build(experiment, run.task.outputs, tuned.pretrained, folded=True, hasten=hasten)
    copy.load(tuned.stored())
    return copy


def find_rows(run: Run, tuned: Tuned, source: str | None = None) -> Rows:
    """Return 256 rows: the run's first test rows where they are found again, else random ones."""
    longest, pad_to = run.experiment.model.max_length, None
    if tuned.method.pads_to_max_length:
        pad_to = longest
    try:
        found = run.rows("test", source)
        chosen = found.select(range(min(ROWS, len(found))))
        test = encode_rows(tuned, [chosen[column] for column in run.task.text], longest)
    except UnipeltError:  # the source is not there, or not the same
        test = Encoded([], [], tuned.tokenizer.pad_token_id)
    drawn = probe_rows(tuned, ROWS - len(test), longest)
    types = None
    if test.types is not None and drawn.types is not None:
        types = [*test.types, *drawn.types]
    both = Encoded([*test.ids, *drawn.ids], types, drawn.pad_id, pad_to)
    return Rows(both, len(test))


def unpadded(rows: Encoded) -> Iterator[list[int]]:
    """Yield batches of rows of one length, for a tool where padding would change the answer."""
    lengths = rows.lengths
    for length in sorted(set(lengths.tolist())):
        alike = (lengths == length).nonzero()[0].tolist()
        yield from (alike[start : start + max(SIZES)] for start in range(0, len(alike), max(SIZES)))


def padded(rows: Encoded) -> Iterator[list[int]]:
    """Yield batches of several sizes, of rows of any length."""
    start, turn = 0, 0
    while start < len(rows):
        size = SIZES[turn % len(SIZES)]
        yield list(range(start, min(start + size, len(rows))))
        start, turn = start + size, turn + 1


def compare(
    rows: Encoded,
    batches: Iterator[list[int]],
    ours: Model,
    theirs: Model,
    to_logits: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Parity:
    """Summarise how far two models are apart on all rows.

    Where they give hidden states, `to_logits` reads logits from them and the mask.
    """
    count, flips, differences = 0, 0, []
    for batch in batches:
        inputs = rows.batch(batch, CPU)
        with torch.inference_mode():
            own, their = ours(**inputs), theirs(**inputs)
            apart = (own - their).abs()
            if to_logits is not None:
                mask = inputs["attention_mask"]
                apart = apart[mask.bool()]
                own, their = to_logits(own, mask), to_logits(their, mask)
        differences.append(apart.flatten())
        flips += int((own.argmax(1) != their.argmax(1)).sum())
        count += len(batch)
    apart = torch.cat(differences)
    return {
        "rows": count,
        "max_abs_logit_diff": float(apart.max()),
        "mean_abs_logit_diff": float(apart.mean()),
        "label_flips": flips,
    }


def compare_library(
    job: Job, batches: Iterator[list[int]], model: Any, *, has_head: bool
) -> Parity:
    """Compare with a model of a library by its logits, or by hidden states if it has no head."""
    rows, classifier = job.rows.encoded, job.tuned.classifier
    if has_head:
        return compare(rows, batches, classifier, lambda **inputs: model(**inputs).logits)

    def read(hidden: Any, mask: Tensor) -> Tensor:
        return classifier.read(classifier._pool(BaseModelOutput(hidden), mask))

    return compare(
        rows,
        batches,
        lambda **inputs: classifier.backbone(**inputs).last_hidden_state,
        lambda **inputs: model(**inputs).last_hidden_state,
        read,
    )


def labelled_config(run: Run, tuned: Tuned) -> Any:
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
