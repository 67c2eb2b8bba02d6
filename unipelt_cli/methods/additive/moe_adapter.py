"""A mixture of experts: small adapters at the feed-forward block's output, chosen by a router.

Shapes: batch B, tokens T, hidden D, bottleneck m, experts E, chosen K, routed units U.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Method,
    Recipe,
    TrainingBatch,
    refuse_unusual_layers,
)
from unipelt_cli.methods.building_blocks import Adapter, linear_at

NOISE_FLOOR = 1e-2  # keeps the load's division finite where the learned noise dies out


class Router(nn.Module):
    """Noisy top-k gating: scores x W_g + N(0, 1) softplus(x W_n), softmax over the K largest.

    Without noise where nothing trains. Both matrices start at zero, as in the paper: chance alone
    spreads the load at first. Always in float32, since a choice must not hang on rounding.
    """

    def __init__(self, hidden: int, experts: int, active: int, folded: bool) -> None:
        super().__init__()
        self.active = active
        self.gate = nn.Parameter(torch.zeros(experts, hidden))
        self.noise: nn.Parameter | None = None
        if not folded:
            self.noise = nn.Parameter(torch.zeros(experts, hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return weights (U, K), experts (U, K) and in training the imbalance, for x (U, D)."""
        with torch.autocast(x.device.type, enabled=False):
            clean = functional.linear(x.float(), self.gate)
            if not self.training or self.noise is None:
                weights, chosen = self._choose(clean)
                return weights, chosen, None
            spread = functional.softplus(functional.linear(x.float(), self.noise)) + NOISE_FLOOR
            scores = clean + torch.randn_like(clean) * spread
            weights, chosen = self._choose(scores)
            return weights, chosen, self._imbalance(clean, spread, scores, weights, chosen)

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Take the K largest scores; a tie goes to the first expert, whatever the device."""
        top, places = scores.sort(dim=-1, descending=True, stable=True)
        return top[:, : self.active].softmax(-1), places[:, : self.active]

    def _imbalance(
        self, clean: Tensor, spread: Tensor, scores: Tensor, weights: Tensor, chosen: Tensor
    ) -> Tensor:
        """Return the squared variation of the experts' importance plus that of their load."""
        importance = torch.zeros_like(scores).scatter(1, chosen, weights).sum(0)
        if self.active == scores.shape[1]:
            return squared_variation(importance)  # each expert has every unit as its load
        return squared_variation(importance) + squared_variation(
            smooth_load(clean, spread, scores, self.active)
        )


def smooth_load(clean: Tensor, spread: Tensor, scores: Tensor, active: int) -> Tensor:
    """Estimate how many units each expert gets, differentiably: (U, E) each -> (E).

    A unit counts with the probability that fresh noise on this expert alone leaves it among the
    `active` largest: Phi((clean - the active-th largest other score) / spread).
    """
    top = scores.topk(active + 1, dim=-1).values
    own_is_in = scores >= top[:, active - 1 : active]
    others = torch.where(own_is_in, top[:, active:], top[:, active - 1 : active])
    counted: Tensor = torch.special.ndtr((clean - others) / spread)
    return counted.sum(0)


def squared_variation(values: Tensor) -> Tensor:
    """Return the squared coefficient of variation: the variance over the squared mean."""
    mean = values.mean()
    return (values - mean).square().mean() / mean.square()


class RoutingState:
    """What the layers of one forward pass share, and what they report; not stored."""

    def __init__(self, experts: int) -> None:
        self.mask = torch.empty(0)  # (B, T)
        self.real = torch.empty(0)  # places of the real tokens in the flattened batch
        self.imbalances: list[Tensor] = []  # of the latest training pass, one a layer
        self.routed = torch.zeros(experts)  # units that each expert got, until reported

    def begin(self, backbone: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Before each forward pass: find the real tokens."""
        self.mask = kwargs["attention_mask"]
        self.real = self.mask.flatten().nonzero().squeeze(1)
        self.imbalances = []


class RoutedAdapters(nn.Module):
    """x -> x + sum of the chosen experts' E_i(x), each by its gate: sum_i G(x)_i E_i(x).

    Each expert computes only the tokens that chose it; padding is no token, and none is dropped.
    """

    def __init__(
        self, method: "MoEAdapter", hidden: int, state: RoutingState, site: AttachContext
    ) -> None:
        super().__init__()
        self.state, self.by_sentence = state, method.routing == "sentence"
        bottleneck = max(1, hidden // method.reduction // method.experts)
        self.router = Router(hidden, method.experts, method.active, site.folded)
        self.experts = nn.ModuleList(
            Adapter(hidden, bottleneck, site.generator) for _ in range(method.experts)
        )

    def adapt(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # (B, T, D) -> same
        """Pass a module's output through the experts: the hook."""
        state = self.state
        flat = output.reshape(-1, output.shape[-1])
        x = flat.index_select(0, state.real)
        weights, chosen, imbalance = self.router(self._pooled(output) if self.by_sentence else x)
        if imbalance is not None:
            state.imbalances.append(imbalance)
        if not self.training:
            state.routed += chosen.flatten().bincount(minlength=len(self.experts)).cpu()
        if self.by_sentence:
            sentence = state.real // output.shape[1]
            weights, chosen = weights[sentence], chosen[sentence]
        for index, expert in enumerate(self.experts):
            rows, ranks = (chosen == index).nonzero(as_tuple=True)
            added = expert(x.index_select(0, rows)) * weights[rows, ranks, None].to(x.dtype)
            flat = flat.index_add(0, state.real[rows], added.to(flat.dtype))
        return flat.view_as(output)

    def _pooled(self, output: Tensor) -> Tensor:  # (B, T, D) -> (B, D)
        share = self.state.mask.float()
        return (output.float() * (share / share.sum(1, keepdim=True))[:, :, None]).sum(1)


class RoutedLayers(nn.ModuleList):
    """The routed adapters of all layers: `backbone.experts`."""

    def __init__(self, layers: list[RoutedAdapters], state: RoutingState) -> None:
        super().__init__(layers)
        self.state = state


@dataclass(frozen=True, config=CHECKS)
class MoEAdapter(Method):
    """A sparsely gated mixture of small adapters (Shazeer et al. 2017, arXiv 1701.06538).

    All experts of a layer together have the bottleneck of one plain adapter. The variance in the
    loss divides by their number n, as in tensor2tensor; other implementations by n - 1.
    """

    experts: Annotated[int, Field(ge=1, le=64, description="adapters a layer")] = 4
    active: Annotated[int, Field(ge=1, description="experts that work on one token")] = 2
    reduction: Annotated[
        int, Field(ge=1, description="hidden size over the bottleneck of all experts together")
    ] = 16
    routing: Annotated[
        Literal["token", "sentence"],
        Field(description="whether each token chooses its experts, or a sentence for all its own"),
    ] = "token"
    balance: Annotated[
        float, Field(ge=0, description="weight of the unequal use of experts in the loss")
    ] = 0.01

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.active > self.experts:
            yield (
                f"active = {self.active}: there are {self.experts} experts",
                f"set method.active={self.experts} or less",
            )

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        return refuse_unusual_layers(layout)

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        state = RoutingState(self.experts)
        layers = []
        for layer in site.layout.layer_list(backbone):
            output = linear_at(layer, site.layout.output)
            layers.append(RoutedAdapters(self, output.out_features, state, site))
            output.register_forward_hook(layers[-1].adapt)
        backbone.experts = RoutedLayers(layers, state)
        backbone.register_forward_pre_hook(state.begin, with_kwargs=True)

    def loss(self, step: TrainingBatch) -> Tensor:
        loss = step.criterion(step.forward())
        imbalances = _routed(step.backbone).state.imbalances
        return loss + self.balance * torch.stack(imbalances).sum()

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return the experts and gates; the noise is training's alone."""
        stored = super().fold(backbone)
        return {name: t for name, t in stored.items() if not name.endswith(".router.noise")}

    def report(self, backbone: nn.Module) -> dict[str, float]:
        """Return the shares of the routing that the most and the least used expert got."""
        state = _routed(backbone).state
        shares = state.routed / state.routed.sum().clamp(min=1)
        state.routed = torch.zeros_like(shares)
        return {"most_used_expert": shares.max().item(), "least_used_expert": shares.min().item()}


def _routed(backbone: nn.Module) -> RoutedLayers:
    layers = backbone.experts
    assert isinstance(layers, RoutedLayers)
    return layers


METHODS = MappingProxyType(
    {
        "moe-adapter": Recipe(
            MoEAdapter(),
            5e-4,
            "additive",
            "small adapters that a router chooses for each token",
            "Shazeer et al. 2017",
        ),
    }
)
