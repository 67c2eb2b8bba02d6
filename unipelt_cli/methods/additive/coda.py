"""CODA: a router sends few tokens through each frozen layer, an adapter takes all of them.

Lei et al. 2023 (arXiv 2304.04947), with the residuals of a post-norm layer.
Shapes: batch B, tokens T, hidden D, routed tokens K.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import CHECKS, AttachContext, Method, Recipe, refuse_unusual_layers
from unipelt_cli.methods.building_blocks import STD, new_linear

ITERATIONS = 20
FIRST_EPSILON, COOLING = 4.0, 0.7
CLOSED = -1e4  # a score that no token reaches


def soft_top_k(
    scores: Tensor, count: Tensor, is_open: Tensor, epsilon: float, iterations: int = ITERATIONS
) -> Tensor:
    """Return weights in [0, 1] that sum to about `count` a row, by coordinate descent in float32.

    They maximise sum(w * s) + epsilon * entropy(w). scores: (B, T); count: (B,); is_open: (B, T),
    false where a token may not be chosen: its weight is 0.
    """
    with torch.autocast(scores.device.type, enabled=False):
        s = scores.float().masked_fill(~is_open, CLOSED)
        wanted = count.float().clamp(min=1.0).log()[:, None]
        b = -s.masked_fill(~is_open, 0.0)
        current = FIRST_EPSILON
        a = torch.zeros_like(wanted)
        for _ in range(iterations):
            a = current * (wanted - ((s + b) / current).logsumexp(1, keepdim=True))
            b = -(s + a).relu()
            current = max(current * COOLING, epsilon)
        chosen = ((s + a + b) / current).exp()
        # The descent only nears the corner where everything is chosen, which is the answer there.
        chosen = torch.where((count >= is_open.sum(1))[:, None], 1.0, chosen)
        return chosen.masked_fill(~is_open, 0.0)


class Rows:
    """What the layers of one forward pass share about its rows; it is not stored."""

    def __init__(self, mask: Tensor, reduction: int) -> None:
        self.is_token = mask.bool()  # (B, T)
        self.lengths = mask.sum(1)
        self.counts = -(-self.lengths // reduction)  # K of each row
        self.most = -(-mask.shape[1] // reduction)
        places = torch.arange(self.most, device=mask.device)
        self.is_routed = places < self.counts[:, None]  # (B, K)


class Routed(NamedTuple):
    """What one layer does with its input, from before the frozen layer to after it."""

    hidden: Tensor  # (B, T, D)
    chosen: Tensor  # (B, K) places of the routed tokens
    weights: Tensor  # (B, K), 0 beyond a row's count


class ConditionalLayer(nn.Module):
    """The router and the adapter of one layer, and the hooks that narrow the layer's input.

    A post-norm layer is h -> Layer(h), without a residual around it; what a token is given is
    its change: h + Adapter(h) + weight * (Layer(h) - h), which at weight 1 is the layer itself.
    """

    def __init__(self, hidden: int, method: "Coda", generator: Generator) -> None:
        super().__init__()
        self.epsilon = method.epsilon
        self.router = nn.Parameter(torch.empty(hidden).normal_(0.0, STD, generator=generator))
        self.down = new_linear(hidden, method.bottleneck, generator)
        self.up = new_linear(method.bottleneck, hidden, generator)
        nn.init.zeros_(self.up.weight)
        self.rows: Rows | None = None
        self.is_flat = False  # whether this pass masks by a row (DistilBERT) or added numbers
        self.routed: Routed | None = None

    def route(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the places of the best tokens and their weights, each (B, K).

        The first token is always routed, so the others compete for one place fewer.
        """
        scores = hidden.float() @ self.router
        competes = rows.is_token.clone()
        competes[:, 0] = False
        weights = soft_top_k(scores, rows.counts - 1, competes, self.epsilon)
        weights = functional.pad(weights[:, 1:], (1, 0), value=1.0)
        rank = scores.detach().masked_fill(~rows.is_token, -torch.inf)
        rank[:, 0] = torch.inf
        chosen = rank.topk(rows.most, dim=1).indices
        return chosen, weights.gather(1, chosen) * rows.is_routed

    def narrow(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Before the layer: give it the routed tokens alone."""
        hidden, mask, *others = args
        rows = self.rows
        assert rows is not None
        chosen, weights = self.route(hidden, rows)
        self.routed = Routed(hidden, chosen, weights)
        routed = hidden.gather(1, chosen[:, :, None].expand(-1, -1, hidden.shape[2]))
        self.is_flat = mask is not None and mask.dim() == 2
        mask = self._attention_mask(rows.is_routed, hidden.dtype)
        return (routed, mask, *others), kwargs

    def look_around(self, attention: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Before the attention: let routed tokens look at every token of their row."""
        assert self.routed is not None
        assert self.rows is not None
        hidden, rows = self.routed.hidden, self.rows
        mask = self._attention_mask(rows.is_token, hidden.dtype)
        if "query" in kwargs:
            return args, {**kwargs, "key": hidden, "value": hidden, "mask": mask}
        return args, {**kwargs, "encoder_hidden_states": hidden, "attention_mask": mask}

    def _attention_mask(self, is_open: Tensor, kind: torch.dtype) -> Tensor:
        """Mask as the layer does: 1 for open (B, K), or a sum with the scores (B, 1, 1, K)."""
        if self.is_flat:
            return is_open.to(kind)
        closed = torch.zeros_like(is_open, dtype=kind)
        return closed.masked_fill(~is_open, torch.finfo(kind).min)[:, None, None]

    def widen(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """After the layer: put its change back where the routed tokens were."""
        assert self.routed is not None
        hidden, chosen, weights = self.routed
        self.routed = self.rows = None
        change = weights[:, :, None].to(hidden.dtype) * (output[0] - args[0])
        places = chosen[:, :, None].expand_as(change)
        return ((hidden + self._adapt(hidden)).scatter_add(1, places, change), *output[1:])

    def _adapt(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        low = functional.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype))
        return functional.linear(low.relu(), self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))


class Conditional(nn.Module):
    """The conditional layers of a backbone, and how many tokens they let skip."""

    def __init__(self, backbone: nn.Module, method: "Coda", site: AttachContext) -> None:
        super().__init__()
        self.reduction = method.reduction
        layers = site.layout.layer_list(backbone)
        hidden = layers[0].get_submodule(site.layout.output).out_features
        assert isinstance(hidden, int)
        self.layers = nn.ModuleList(
            ConditionalLayer(hidden, method, site.generator) for _ in layers
        )
        self.tokens: Tensor | int = 0  # real tokens met, in every layer
        self.routed: Tensor | int = 0  # of these, how many went through
        backbone.register_forward_pre_hook(self._begin, with_kwargs=True)
        for conditional, layer in zip(self.layers, layers, strict=True):
            assert isinstance(conditional, ConditionalLayer)
            layer.register_forward_pre_hook(conditional.narrow, with_kwargs=True)
            layer.register_forward_hook(conditional.widen)
            if method.attends == "all":
                attention = layer.get_submodule(site.layout.attention)
                attention.register_forward_pre_hook(conditional.look_around, with_kwargs=True)

    def _begin(self, backbone: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        rows = Rows(kwargs["attention_mask"], self.reduction)
        for conditional in self.layers:
            assert isinstance(conditional, ConditionalLayer)
            conditional.rows = rows
        self.tokens = self.tokens + rows.lengths.sum()
        self.routed = self.routed + rows.counts.sum()


@dataclass(frozen=True, config=CHECKS)
class Coda(Method):
    """Conditional adapters: only 1/R of a row's tokens pass each frozen layer."""

    reduction: Annotated[
        int, Field(ge=1, description="a row's tokens over those that pass a layer")
    ] = 2
    bottleneck: Annotated[int, Field(ge=1, description="width of the adapter")] = 64
    epsilon: Annotated[
        float, Field(ge=0.01, le=4, description="how soft the choice of tokens ends up")
    ] = 0.03
    attends: Annotated[
        Literal["routed", "all"],
        Field(description="what routed tokens attend to: each other, or every token"),
    ] = "routed"

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)
        if hasattr(config, "relative_attention_num_buckets"):
            yield (
                f"{layout.model_type} counts how far tokens are apart, and routed tokens are "
                "taken out of their row",
                "choose a backbone with absolute positions, such as bert-base-uncased",
            )

    @property
    def idle(self) -> Mapping[str, str]:
        return {
            r"conditional\.layers\.\d+\.router": "no gradient where every weight is 1: with [CLS] "
            "pooling always in the last layer, elsewhere when its choice is certain"
        }

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone.conditional = Conditional(backbone, self, site)

    def report(self, backbone: nn.Module) -> dict[str, float]:
        conditional = backbone.conditional
        assert isinstance(conditional, Conditional)
        tokens, routed = int(conditional.tokens), int(conditional.routed)
        conditional.tokens = conditional.routed = 0
        return {"skip_rate": 1 - routed / tokens} if tokens else {}


METHODS: Mapping[str, Recipe] = MappingProxyType(
    {
        "coda": Recipe(
            Coda(),
            1e-3,
            "additive",
            "a router lets most tokens skip each frozen layer; an adapter takes all",
            "Lei et al. 2023",
        ),
    }
)
