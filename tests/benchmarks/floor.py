"""The floor under a pass: its matrix products on real tokens, at the rate this machine has."""

from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tests.benchmarks.contenders import timed

PRODUCT_ROWS = 1024
REPEATS = 15


def operations(lengths: np.ndarray, config: Any, *, trains: bool) -> float:
    """Count a pass's operations, a product's term as two; submodules and head are left out.

    Training adds the gradients of inputs, not those of frozen weights; the first layer's
    projections read embeddings, which need none.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens, pairs = float(lengths.sum()), float((lengths.astype(float) ** 2).sum())
    linear = 2 * tokens * layers * (4 * hidden**2 + 2 * hidden * inner)
    attention = 4 * pairs * layers * hidden  # scores and values
    if not trains:
        return linear + attention
    return 2 * linear - 2 * tokens * 3 * hidden**2 + 3 * attention


def matmul_rate(config: Any, dtype: torch.dtype, device: torch.device) -> float:
    """Return operations a second over the products of one layer, each timed by its median."""
    hidden, inner = config.hidden_size, config.intermediate_size
    counted = spent = 0.0
    for wide, narrow, count in ((hidden, hidden, 4), (hidden, inner, 1), (inner, hidden, 1)):
        rows = torch.randn(PRODUCT_ROWS, wide, device=device, dtype=dtype)
        weight = torch.randn(narrow, wide, device=device, dtype=dtype)
        with torch.inference_mode():
            runs = [
                timed(lambda rows=rows, weight=weight: functional.linear(rows, weight))
                for _ in range(REPEATS + 3)
            ]
        spent += count * median(runs[3:])
        counted += count * 2.0 * PRODUCT_ROWS * wide * narrow
    return counted / spent
