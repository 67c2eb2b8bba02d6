"""AdaMix: several small adapters a layer, one drawn at each step, all averaged when stored.

They stand at the feed-forward block's output, before its dropout and without a norm of their own.
Shapes: batch B, tokens T, hidden D, bottleneck m, experts E.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Method,
    Published,
    Recipe,
    TrainingBatch,
    refuse_unusual_layers,
)
from unipelt_cli.methods.building_blocks import STD, linear_at, new_linear


class AveragedAdapter(nn.Module):
    """x -> x + up(gelu(down_i(x))): training draws i, evaluation takes the mean of all downs.

    With one expert it is its own average, which is the stored form.
    """

    def __init__(self, hidden: int, bottleneck: int, experts: int, generator: Generator) -> None:
        super().__init__()
        drawn = torch.empty(experts, bottleneck, hidden).normal_(0.0, STD, generator=generator)
        self.down = nn.Parameter(drawn)
        self.down_bias = nn.Parameter(torch.zeros(experts, bottleneck))
        self.up = new_linear(bottleneck, hidden, generator)

    def averaged(self) -> tuple[Tensor, Tensor]:  # (m, D), (m)
        """Return the mean of the experts' weights and of their biases."""
        return self.down.mean(0), self.down_bias.mean(0)

    def adapt(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # (B, T, D) -> same
        """Pass a module's output through the adapter: the hook."""
        if self.training:
            index = int(torch.randint(len(self.down), ()))
            weight, bias = self.down[index], self.down_bias[index]
        else:
            weight, bias = self.averaged()
        dtype = output.dtype
        low = functional.gelu(functional.linear(output, weight.to(dtype), bias.to(dtype)))
        up = self.up
        return output + functional.linear(low, up.weight.to(dtype), up.bias.to(dtype))


@dataclass(frozen=True, config=CHECKS)
class AdaMix(Method):
    """Experts that are drawn at random in training and become one adapter by averaging.

    Wang et al. 2022 (arXiv 2205.12410). Two passes a step, with other experts each, are held
    together by the symmetric divergence of their predictions. The paper's formula differentiates
    both sides of each half; the release, and `stop_gradient`, one, which halves the gradient.
    """

    experts: Annotated[int, Field(ge=1, le=64, description="down-projections a layer")] = 4
    reduction: Annotated[int, Field(ge=1, description="hidden size over bottleneck")] = 16
    consistency: Annotated[
        float, Field(ge=0, description="weight of the two passes' divergence; 0: one pass a step")
    ] = 1.0
    stop_gradient: Annotated[
        bool, Field(description="whether each half of the divergence moves one pass alone")
    ] = True

    @property
    def earlier(self) -> Mapping[str, Any]:
        return {"stop_gradient": False}

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        return refuse_unusual_layers(layout)

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        experts = 1 if site.folded else self.experts
        adapters = []
        for layer in site.layout.layer_list(backbone):
            output = linear_at(layer, site.layout.output)
            hidden = output.out_features
            bottleneck = max(1, hidden // self.reduction)
            adapters.append(AveragedAdapter(hidden, bottleneck, experts, site.generator))
            output.register_forward_hook(adapters[-1].adapt)
        backbone.experts = nn.ModuleList(adapters)

    def decays(self, name: str) -> bool:
        """Spare the biases, which are a matrix here: one row an expert."""
        return not name.endswith("bias")

    def loss(self, step: TrainingBatch) -> Tensor:
        first = step.forward()
        loss = step.criterion(first)
        if self.consistency == 0:
            return loss
        apart = divergence(first, step.forward(), step.is_regression, self.stop_gradient)
        return loss + self.consistency * apart

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return one adapter a layer: the mean of the experts, beside the shared up-projection."""
        stored = super().fold(backbone)
        assert isinstance(backbone.experts, nn.ModuleList)
        for index, adapter in enumerate(backbone.experts):
            assert isinstance(adapter, AveragedAdapter)
            with torch.no_grad():
                for name, mean in zip(("down", "down_bias"), adapter.averaged(), strict=True):
                    stored[f"experts.{index}.{name}"] = mean[None]
        return stored


def divergence(first: Tensor, second: Tensor, is_regression: bool, stop_gradient: bool) -> Tensor:
    """Return how far two passes' logits, each (B, outputs), are apart: the mean over rows.

    (KL(p | q) + KL(q | p)) / 2, where with `stop_gradient` a half's first operand is a constant. A
    softmax over the single output of a regression says nothing: there it is the squared difference.
    """
    if not is_regression:
        first, second = first.log_softmax(-1), second.log_softmax(-1)
    targets = (first.detach(), second.detach()) if stop_gradient else (first, second)
    halves = zip(targets, (second, first), strict=True)
    if is_regression:
        apart = [functional.mse_loss(moved, target) for target, moved in halves]
    else:
        apart = [(p.exp() * (p - q)).sum(-1).mean() for p, q in halves]
    return torch.stack(apart).mean()


METHODS = MappingProxyType(
    {
        "adamix": Recipe(
            AdaMix(),
            1e-3,
            "unified",
            "adapters drawn at random, averaged into one",
            "Wang et al. 2022",
            published=Published(4e-4, {"epochs": 40, "batch_size": 64, "weight_decay": 0.1}),
        ),
    }
)
