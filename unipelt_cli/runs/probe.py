"""The probe: logits on seeded random tokens, which tell whether a model is the same."""

from typing import Any

import numpy as np

from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.evaluation import Logits, compute_logits
from unipelt_cli.models.tuned import Tuned

PROBE_ROWS = 64
PROBE_TOLERANCE = 1e-4
ROUGH_TOLERANCE = 0.1  # in bf16, and on another kind of device


def probe(tuned: Tuned) -> Logits:
    """Return all heads' logits of the probe rows: a fingerprint without user text."""
    rows, tasks = probe_rows(tuned), range(len(tuned.classifier.heads))
    return np.concatenate([compute_logits(tuned, rows, task) for task in tasks], axis=1)


def probe_rows(tuned: Tuned, count: int = PROBE_ROWS, longest: int | None = None) -> Encoded:
    """Draw rows of seeded random tokens that a model's backbone can read, `longest` of length."""
    config: Any = tuned.classifier.backbone.config
    random = np.random.default_rng(0)
    pad_id = config.pad_token_id or 0
    ids = [
        [int(token) for token in random.integers(0, config.vocab_size, length) if token != pad_id]
        or [(pad_id + 1) % config.vocab_size]
        for length in random.integers(4, 33, count)
    ]
    limits = (tuned.pretrained.layout.positions(config), longest)
    limit = min((limit for limit in limits if limit is not None), default=None)
    native = tuned.pretrained.layout.native
    if native is not None and native.reads_last:  # its classifier looks for one end mark a row
        end = config.eos_token_id
        own = [[token for token in row if token != end] for row in ids]
        ids = [[*row[: limit and limit - 1], end] for row in own]
    ids = [row[:limit] for row in ids]
    has_types = getattr(config, "type_vocab_size", 0) > 1
    return Encoded(
        ids,
        [[0] * len(row) for row in ids] if has_types else None,
        pad_id,
    )
