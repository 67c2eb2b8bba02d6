"""What a gate computes: one scalar an example, the mean of sigmoid(w.x + b) over its tokens.

Mao et al. 2022 (arXiv 2110.07577), section 3.1. Shapes: batch B, tokens T, hidden D, gates E.
"""

import torch
from torch import Tensor
from torch.nn import functional


def token_weights(mask: Tensor, *, masked: bool) -> Tensor:  # (B, T) -> (B, T)
    """Return what each token counts in a gate's mean, in float32: each row sums to 1.

    With `masked` real tokens count alike and padding not at all; the authors' code counts both.
    """
    counted = mask.float() if masked else torch.ones_like(mask, dtype=torch.float32)
    return counted / counted.sum(1, keepdim=True)


def open_gates(x: Tensor, weight: Tensor, bias: Tensor, token_weights: Tensor) -> Tensor:
    """Return how far each gate opens for each row, (B, E), always computed in float32.

    For states x (B, T, D), the gates' weight (E, D) and bias (E), and `token_weights` (B, T).
    """
    with torch.autocast(x.device.type, enabled=False):
        opened = functional.linear(x.float(), weight, bias).sigmoid()  # (B, T, E)
        return (opened * token_weights[:, :, None]).sum(1)
