"""Differences that learn which of them to keep, then are pruned to a share.

Guo, Rush and Kim 2021 (arXiv 2012.07463): diff pruning.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unipelt_cli.methods.base import CHECKS, AttachContext, Published, Recipe, Stage, TrainingBatch
from unipelt_cli.methods.partial.overlay import Deltas, Overlay, frozen, top
from unipelt_cli.methods.partial.sparse_updates import Sparse, sparse

LOW, HIGH = -1.5, 1.5
RARE = 1e-4
OPEN = 5.0
NODES = (
    (0.03376524289842399, 0.08566224618958517),
    (0.16939530676686774, 0.18038078652406930),
    (0.38069040695840155, 0.23395696728634552),
    (0.61930959304159845, 0.23395696728634552),
    (0.83060469323313226, 0.18038078652406930),
    (0.96623475710157601, 0.08566224618958517),
)
"""Gauss's six points and weights on (0, 1): enough for float32, whatever alpha is."""


def sample_gate(alpha: Tensor) -> Tensor:
    """Draw hard-concrete gates, clamp(s (hi - lo) + lo, 0, 1), of the same shape."""
    noise = torch.empty_like(alpha).uniform_(RARE, 1 - RARE).logit_()
    return ((noise + alpha).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def expected_gate(alpha: Tensor) -> Tensor:
    """Return the mean of `sample_gate`: P(gate > t) over t from 0 to 1."""
    total = torch.zeros_like(alpha)
    for t, weight in NODES:
        s = (t - LOW) / (HIGH - LOW)
        total += weight * (alpha - torch.tensor(s).logit()).sigmoid()
    return total


def open_chance(alpha: Tensor) -> Tensor:
    """Return P(gate > 0) = sigmoid(alpha - log(-lo / hi)); the bounds make the log 0."""
    return alpha.sigmoid()


class SampledDifference(torch.autograd.Function):
    """w * sample_gate(alpha) * gate, with a third of the memory traffic of separate operations.

    Large tensors are allocated anew each time, and that is where the time goes.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, gate: Tensor) -> Tensor:  # (n,), (n,), ()
        s = torch.empty_like(alpha).uniform_(RARE, 1 - RARE).logit_().add_(alpha).sigmoid_()
        ctx.save_for_backward(w, s, gate)
        return (s * (HIGH - LOW)).add_(LOW).clamp_(0, 1).mul_(gate).mul_(w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, s, gate = ctx.saved_tensors
        (of_result,) = gradients
        of_w = (s * (HIGH - LOW)).add_(LOW)
        is_inside = (of_w >= 0) & (of_w <= 1)
        of_w.clamp_(0, 1).mul_(of_result)
        of_gate = torch.dot(of_w, w)
        of_alpha = (s * (HIGH - LOW)).mul_(1 - s).mul_(is_inside)
        of_alpha.mul_(of_result).mul_(w).mul_(gate)
        return of_w.mul_(gate), of_alpha, of_gate


sampled_difference: Callable[[Tensor, Tensor, Tensor], Tensor] = SampledDifference.apply


class Differences(Overlay):
    """Before pruning: pretrained + gate * group's gate * w, for every entry of N in T tensors."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self.sizes = [parameter.numel() for parameter in self.own]
        device = self.own[0].device
        self.w = nn.Parameter(torch.zeros(sum(self.sizes), device=device))  # (N,)
        self.alpha = nn.Parameter(torch.full_like(self.w, OPEN))  # (N,)
        self.groups = nn.Parameter(torch.full((len(self.own),), OPEN, device=device))  # (T,)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Return each tensor's part of N numbers."""
        return torch.split(flat, self.sizes)

    def gated(self) -> Iterator[Tensor]:
        """Yield each tensor's differences, flat: sampled in training, expected otherwise."""
        parts = zip(self.split(self.w), self.split(self.alpha), self.groups, strict=True)
        for w, alpha, group in parts:
            if self.training:
                yield sampled_difference(w, alpha, sample_gate(group))
            else:
                yield w * (expected_gate(alpha) * expected_gate(group))

    def weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter, added in zip(self.own, self.gated(), strict=True):
            yield parameter, parameter + added.view_as(parameter)

    def expected_count(self) -> Tensor:
        """Return how many entries are expected to differ: the mean L0 norm, summed in float32."""
        chances = zip(self.split(self.alpha), self.groups, strict=True)
        counts = [open_chance(alpha).sum() * open_chance(group) for alpha, group in chances]
        return torch.stack(counts).sum()

    def free(self) -> None:
        """Give the memory back, also to who still holds the tensors."""
        for parameter in self.parameters():
            parameter.grad = None
            parameter.data = parameter.data.new_empty(0)


@dataclass(frozen=True, config=CHECKS)
class DiffPruning(Sparse):
    """Learn differences with gates under an L0 penalty; keep the largest and train them further.

    The penalty is an entry's, so that it weighs against that entry's own gradient alike in a small
    and a large backbone (divided by their number it would sink below AdamW's epsilon in a large
    one). The default is four times the paper's, for a training of a hundred rows has few steps.
    One norm clips all gradients; the authors' code clips differences and gates apart.
    """

    penalty: Annotated[float, Field(ge=0, description="what each entry that differs costs")] = 5e-7
    weight_rate: Annotated[
        float, Field(gt=0, description="learning rate of the differences, over the run's")
    ] = 0.1
    gate_rate: Annotated[
        float, Field(gt=0, description="learning rate of the gates, over the run's")
    ] = 100.0

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        parameters = frozen(backbone)
        total = sum(p.numel() for p in parameters.values())
        deltas = Deltas(parameters, max(1, int(self.share * total)))
        if site.folded:
            deltas.lay_over(backbone)
        else:
            deltas.requires_grad_(False)
            differences = Differences(parameters)
            differences.lay_over(backbone)
            backbone.differences = differences
        backbone.sparse = deltas

    @property
    def idle(self) -> Mapping[str, str]:
        return {r"differences\..*": "they are gone once they are pruned"}

    @property
    def stages(self) -> tuple[Stage, ...]:
        return Stage(0.5, selects=False), Stage(0.5)

    def enter_stage(self, backbone: nn.Module, stage: int) -> None:
        """Keep the largest expected differences, exactly the share; the others are nothing."""
        differences, kept = backbone.differences, sparse(backbone)
        assert isinstance(differences, Differences)
        with torch.no_grad():
            expected = torch.cat(list(differences.eval().gated()))
            places = top(expected.abs(), len(kept.deltas))
            kept.load(places, expected[places.long()])
        differences.lift()
        differences.free()
        del backbone.differences
        kept.requires_grad_(True)
        kept.lay_over(backbone)

    def loss(self, step: TrainingBatch) -> Tensor:
        loss = super().loss(step)
        if isinstance(differences := getattr(step.backbone, "differences", None), Differences):
            loss = loss + self.penalty * differences.expected_count()
        return loss

    def rate(self, name: str) -> float:
        rates = {"differences.w": self.weight_rate, "sparse.deltas": 1.0}
        return rates.get(name, self.gate_rate if name.startswith("differences.") else 1.0)

    def trainable(self, backbone: nn.Module) -> int:
        """Count the first stage's numbers: a difference and a gate an entry, a gate a tensor."""
        kept = sparse(backbone)
        added = ("sparse.", "differences.")
        lent = (
            parameter.numel()
            for name, parameter in backbone.named_parameters()
            if parameter.requires_grad and not name.startswith(added)
        )
        return 2 * kept.entries.total + len(kept.own) + sum(lent)

    def merge(self, backbone: nn.Module) -> None:
        differences = getattr(backbone, "differences", None)
        if isinstance(differences, Differences):
            differences.eval().merge()
            del backbone.differences
        super().merge(backbone)


METHODS = MappingProxyType(
    {
        "diff-pruning": Recipe(
            DiffPruning(),
            1e-3,
            "partial",
            "differences that learn which of them to keep",
            "Guo et al. 2021",
            published=Published(
                5e-5,
                {"epochs": 6, "batch_size": 8, "warmup": 0.0},
                {"penalty": 1.25e-7, "weight_rate": 0.2, "gate_rate": 2000.0},
            ),
        ),
    }
)
