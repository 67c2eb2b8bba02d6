"""AdaLoRA: low-rank updates of every matrix whose ranks compete for one shrinking budget.

Zhang et al. 2023 (arXiv 2303.10512): W + s P diag(l) Q, where P (O, R) and Q (R, I) are pulled
towards orthogonality and the least important entries of l are zeroed, over the whole backbone.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Published,
    Recipe,
    Stage,
    StagePosition,
    TrainingBatch,
)
from unipelt_cli.methods.building_blocks import STD
from unipelt_cli.methods.reparameterised.dora_and_vera import (
    Reparameterised,
    Update,
    Updates,
    updates_of,
)

PLACES = ("query", "key", "value", "attention_output", "intermediate", "output")


class Triplets(Update):
    """R triplets of one matrix: a column of P, a number, a row of Q; the numbers start at 0."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: Generator) -> None:
        super().__init__()
        self.scale = scale
        self.p = nn.Parameter(torch.empty(linear.out_features, rank))
        self.values = nn.Parameter(torch.zeros(rank))
        self.q = nn.Parameter(torch.empty(rank, linear.in_features))
        for matrix in (self.p, self.q):
            nn.init.normal_(matrix, 0.0, STD, generator=generator)

    def changed(self, x: Tensor, output: Tensor, linear: nn.Linear) -> Tensor:
        low = functional.linear(x, self.q.to(x.dtype)) * (self.values * self.scale).to(x.dtype)
        return output + functional.linear(low, self.p.to(x.dtype))

    def merged(self, weight: Tensor) -> Tensor:
        return weight.float() + self.scale * (self.p * self.values) @ self.q

    def penalty(self, *, squared: bool) -> Tensor:
        """Return ||P^T P - I|| + ||Q Q^T - I||, Frobenius norms, or the sum of their squares."""
        identity = torch.eye(len(self.values), device=self.p.device)
        with torch.autocast(self.p.device.type, enabled=False):
            left, right = self.p.T @ self.p - identity, self.q @ self.q.T - identity
            norms = torch.stack([torch.linalg.vector_norm(left), torch.linalg.vector_norm(right)])
        return norms.square().sum() if squared else norms.sum()


class Contest(nn.Module):
    """How much each triplet of one matrix matters, smoothed over the steps, and which are kept."""

    smoothed: Tensor
    uncertainty: Tensor
    kept: Tensor

    def __init__(self, triplets: Triplets) -> None:
        super().__init__()
        size = triplets.p.numel() + triplets.values.numel() + triplets.q.numel()
        self.register_buffer("smoothed", torch.zeros(size))
        self.register_buffer("uncertainty", torch.zeros(size))
        self.register_buffer("kept", torch.ones(triplets.values.numel()))

    def observe(self, triplets: Triplets, beta: float) -> None:
        """Take up this step's sensitivities |w g|, and how far they are from their own mean."""
        sensitivity = torch.cat(
            [
                (p.detach() * p.grad).abs().flatten()
                for p in triplets.parameters()
                if p.grad is not None
            ]
        )
        self.smoothed.lerp_(sensitivity, 1 - beta)
        self.uncertainty.lerp_((sensitivity - self.smoothed).abs(), 1 - beta)

    def importance(self, triplets: Triplets) -> Tensor:
        """Return one score a triplet (R,): its number's, and its column's and row's means."""
        scores = self.smoothed * self.uncertainty
        p, values, q = torch.split(scores, [t.numel() for t in triplets.parameters()])
        total: Tensor = p.view_as(triplets.p).mean(0) + values + q.view_as(triplets.q).mean(1)
        return total


@dataclass(frozen=True, config=CHECKS)
class AdaLoRA(Reparameterised):
    """Low-rank updates of all six matrices of a layer, pruned to a budget by importance.

    Ranks are given out in a first stage that no epoch can be chosen from; the second trains on
    with the ranks fixed, so early stopping never meets a budget that is not reached. Both share
    one optimiser and one schedule of the rate, as in paper and release. The penalty is a Frobenius
    norm, as in the release (and PEFT), with its weight; the paper's formula squares it.
    """

    rank: Annotated[int, Field(ge=1, le=1024, description="rank of each matrix at the start")] = 12
    target_rank: Annotated[int, Field(ge=1, le=1024, description="mean rank that is kept")] = 8
    alpha: Annotated[float, Field(gt=0, description="updates are scaled by alpha / rank")] = 32.0
    allocation: Annotated[
        float, Field(gt=0, lt=1, description="share of the epochs in which ranks are given out")
    ] = 0.25
    hold: Annotated[
        float, Field(ge=0, lt=1, description="share of that stage before the budget shrinks")
    ] = 0.2
    smoothing: Annotated[
        float, Field(ge=0, lt=1, description="weight of the past in importance and uncertainty")
    ] = 0.85
    orthogonality: Annotated[
        float, Field(ge=0, description="weight of the penalty, a mean over P and Q of all matrices")
    ] = 0.1
    penalty: Annotated[
        Literal["norm", "squared"],
        Field(
            description="how far from orthogonal: a Frobenius norm (release), or squared (paper)"
        ),
    ] = "norm"

    @property
    def earlier(self) -> Mapping[str, Any]:
        return {"penalty": "squared"}

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.target_rank > self.rank:
            yield (
                f"target_rank = {self.target_rank}: more than rank = {self.rank}",
                "ranks are only taken away: give a rank that is at least the target",
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        first = Stage(self.allocation, selects=False)
        return first, Stage(1 - self.allocation, continues=True)

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        scale = self.alpha / self.rank
        updates = Updates(
            backbone,
            site.layout,
            PLACES,
            lambda linear: Triplets(linear, self.rank, scale, site.generator),
        )
        if not site.folded:
            triplets = [update for update in updates if isinstance(update, Triplets)]
            updates.contests = nn.ModuleList(map(Contest, triplets))
        backbone.updates = updates

    def loss(self, step: TrainingBatch) -> Tensor:
        squared = self.penalty == "squared"
        penalties = [update.penalty(squared=squared) for update, _ in _pairs(step.backbone)]
        mean = torch.stack(penalties).mean() / 2
        return super().loss(step) + self.orthogonality * mean

    def after_backward(self, backbone: nn.Module, moment: StagePosition) -> None:
        for triplets, contest in _pairs(backbone):
            if moment.stage == 0:
                contest.observe(triplets, self.smoothing)
            if triplets.values.grad is not None:
                triplets.values.grad.mul_(contest.kept)

    def after_step(self, backbone: nn.Module, moment: StagePosition) -> None:
        if moment.stage == 0:
            self._allocate(backbone, self.budget(moment))
        with torch.no_grad():
            for triplets, contest in _pairs(backbone):
                triplets.values.mul_(contest.kept)

    def budget(self, moment: StagePosition) -> float:
        """Return the mean rank after a step of the first stage: it falls with a cubic slope."""
        held = round(self.hold * moment.steps)
        left = 1 - max(0, moment.step + 1 - held) / max(1, moment.steps - held)
        return self.target_rank + (self.rank - self.target_rank) * left**3

    def _allocate(self, backbone: nn.Module, mean_rank: float) -> None:
        """Keep the most important triplets of the whole backbone; a pruned one may come back."""
        pairs = list(_pairs(backbone))
        scores = torch.cat([contest.importance(triplets) for triplets, contest in pairs])
        order = scores.argsort(descending=True, stable=True)[: round(mean_rank * len(pairs))]
        kept = torch.zeros_like(scores).index_fill_(0, order, 1.0)
        for (_, contest), layer_kept in zip(pairs, torch.split(kept, self.rank), strict=True):
            contest.kept.copy_(layer_kept)


def _pairs(backbone: nn.Module) -> Iterator[tuple[Triplets, Contest]]:
    updates = updates_of(backbone)
    contests = updates.contests
    assert isinstance(contests, nn.ModuleList)
    for update, contest in zip(updates, contests, strict=True):
        assert isinstance(update, Triplets)
        assert isinstance(contest, Contest)
        yield update, contest


METHODS = MappingProxyType(
    {
        "adalora": Recipe(
            AdaLoRA(),
            1e-3,
            "reparameterised",
            "low-rank updates of all six matrices, ranks given out by importance",
            "Zhang et al. 2023",
            published=Published(8e-4, {"epochs": 24, "batch_size": 32, "weight_decay": 0.01}),
        ),
    }
)
