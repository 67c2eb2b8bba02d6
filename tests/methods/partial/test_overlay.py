"""Deltas lie over the backbone for one pass, and leave no trace."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.models import experiment
from support.partial import NATIVE
from torch import Tensor, nn

from unipelt_cli.methods.partial.overlay import Deltas, Overlay
from unipelt_cli.methods.partial.sparse_updates import sparse
from unipelt_cli.models.build import build


class Doubled(Overlay):
    def weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter in self.own:
            yield parameter, 2 * parameter


class Pair(nn.Module):
    """Two linear units with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        if not torch.isfinite(result).all():
            raise ValueError("not a number")
        return result


def test_a_pass_sees_a_tied_tensor_everywhere_and_leaves_no_trace() -> None:
    pair = Pair()
    x = torch.eye(3)
    plain = pair(x)
    overlay = Doubled(dict(pair.named_parameters()))
    overlay.lay_over(pair)
    assert torch.allclose(pair(x), 4 * plain)
    names = list(pair.state_dict())
    with pytest.raises(ValueError, match="not a number"):
        pair(x / 0)
    assert "weight" not in vars(pair.first)
    assert pair.first.weight is pair.second.weight
    overlay.merge()
    assert torch.allclose(pair(x), 4 * plain)
    assert list(pair.state_dict()) == names


@pytest.mark.parametrize("method", ["fish-mask", "diff-pruning"])
def test_a_delta_smaller_than_bf16_can_see_is_kept(calm: Path, method: str) -> None:
    settings = experiment(calm, method, model=NATIVE, train={"precision": "bf16"})
    tuned = build(settings, 2, folded=True)
    own = sparse(tuned.classifier.backbone)
    assert isinstance(own, Deltas)
    assert all(p.dtype == torch.float32 for p in tuned.classifier.parameters())
    with torch.no_grad():
        own.deltas.fill_(1e-5)
    (_, weight), *_ = own.weights()
    assert weight.dtype == torch.float32
    assert torch.equal(weight.flatten()[:5], own.own[0].flatten()[:5] + 1e-5)
