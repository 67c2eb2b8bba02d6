"""The probe: logits on seeded random tokens, which tell whether a model is the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unipelt_cli.errors import RunError
from unipelt_cli.files import sealed
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.evaluation import Logits, compute_logits
from unipelt_cli.models.label_scale import LabelScale
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.tasks import Task

PROBE_ROWS = 64
EXACT = "fp32"
_LOGITS, _EXACT_LOGITS = "logits", f"logits.{EXACT}"  # tensors of probe.safetensors
_EXACT_BOUNDS = 1e-4, 1e-5  # at least, and of the largest logit
# In bf16 the logits of every method and architecture that is tested move by up to 3 % of their
# range, those of the demo by 1 %.
_ROUGH_BOUNDS = 0.02, 0.05  # at least, and of the logits' range


@dataclass(frozen=True)
class Likeness:
    """How far a model's logits are from the expected ones, and how far they may be."""

    precision: str
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether they are the same, as far as the precision can tell; NaN never is."""
        return self.difference <= self.allowed


@dataclass(frozen=True)
class StoredProbe:
    """The logits (rows, outputs of all heads) that a run stored, by precision, its own first.

    Every run has them in fp32 too, where a difference tells more than in bf16; one of an earlier
    version has its own alone.
    """

    by_precision: Mapping[str, Tensor]
    device: str
    units: Tensor

    def compare(self, tuned: TunedModel) -> Likeness:
        """Compare a model with what was stored in its precision, else with the run's own."""
        stored = self.by_precision
        precision = tuned.precision if tuned.precision in stored else next(iter(stored))
        is_alike = (precision, self.device) == (tuned.precision, tuned.device.type)
        logits = torch.from_numpy(probe(tuned))
        expected = stored[precision] / self.units
        return likeness(logits / self.units, expected, tuned.precision, is_alike=is_alike)


def likeness(logits: Tensor, expected: Tensor, precision: str, *, is_alike: bool) -> Likeness:
    """Compare logits that were computed in `precision` with expected ones of the same shape.

    `is_alike` says that those were too, and on the same kind of device. In bf16 a rounding may even
    then fall otherwise, with the number of threads or the rows of a batch; then the logits may
    differ by a share of their range.
    """
    if is_alike and precision == EXACT:
        (floor, share), size = _EXACT_BOUNDS, expected.abs().max()
    else:
        (floor, share), size = _ROUGH_BOUNDS, expected.max() - expected.min()
    difference = float((logits - expected).abs().max())
    return Likeness(precision, difference, max(floor, share * float(size)))


def write_probe(path: Path, precision: str, logits: Tensor, exact: Tensor | None) -> None:
    """Store the probe's logits in a run's own precision and, where that is another, in fp32."""
    tensors = {_LOGITS: logits}
    if precision != EXACT and exact is not None:
        tensors[_EXACT_LOGITS] = exact
    sealed.write_tensors(path, tensors, {"rows": PROBE_ROWS})


def read_probe(path: Path, precision: str, device: str, units: Tensor) -> StoredProbe:
    """Read what a run of this precision, kind of device and units (outputs,) stored.

    Raises RunError for tensors that cannot be its logits.
    """
    tensors, _ = sealed.open_tensors(path)
    names = {precision: _LOGITS} | ({EXACT: _EXACT_LOGITS} if _EXACT_LOGITS in tensors else {})
    stored = {kind: tensors[name] for kind, name in names.items() if name in tensors}
    shape = (PROBE_ROWS, len(units))
    if precision not in stored or not all(_is_whole(logits, shape) for logits in stored.values()):
        raise RunError(f"{path}: damaged", sealed.REMEDY)
    return StoredProbe(stored, device, units)


def _is_whole(logits: Tensor, shape: tuple[int, int]) -> bool:
    is_right = logits.dtype == torch.float32 and tuple(logits.shape) == shape
    return is_right and bool(torch.isfinite(logits).all())


def probe(tuned: TunedModel) -> Logits:
    """Return all heads' logits of the probe rows: a fingerprint without user text."""
    apart = tuned.classifier.apart
    rows = {
        texts: probe_rows(tuned, texts=texts)
        for texts in {1 + second_texts for second_texts in apart}
    }
    each = [
        compute_logits(tuned, rows[1 + second_texts], task)
        for task, second_texts in enumerate(apart)
    ]
    return np.concatenate(each, axis=1)


def units_of(tasks: Sequence[Task], scales: Sequence[LabelScale]) -> Tensor:
    """Return the unit in which each output of all heads is compared: that of its label scale.

    Values of prices are as large as prices, and must not hide what became of another head.
    """
    pairs = zip(tasks, scales, strict=True)
    return torch.cat([torch.full((task.outputs,), scale.unit) for task, scale in pairs])


def probe_rows(
    tuned: TunedModel, count: int = PROBE_ROWS, longest: int | None = None, texts: int = 1
) -> Encoded:
    """Draw rows of seeded random tokens that a model's backbone can read, `longest` of length.

    Each row has so many texts, which are read apart.
    """
    config: Any = tuned.classifier.backbone.config
    random = np.random.default_rng(0)
    pad_id = config.pad_token_id or 0
    ids = [
        [int(token) for token in random.integers(0, config.vocab_size, length) if token != pad_id]
        or [(pad_id + 1) % config.vocab_size]
        for length in random.integers(4, 33, texts * count)
    ]
    limits = (tuned.pretrained.layout.positions(config), longest)
    limit = min((limit for limit in limits if limit is not None), default=None)
    native = tuned.pretrained.layout.native
    if native is not None and native.reads_last:  # its classifier looks for one end mark a row
        end = config.eos_token_id
        without_end = [[token for token in row if token != end] for row in ids]
        ids = [[*row[: limit and limit - 1], end] for row in without_end]
    ids = [row[:limit] for row in ids]
    has_types = getattr(config, "type_vocab_size", 0) > 1
    return Encoded(
        ids,
        [[0] * len(row) for row in ids] if has_types else None,
        pad_id,
        texts=texts,
    )
