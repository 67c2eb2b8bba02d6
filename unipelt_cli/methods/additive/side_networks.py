"""A small network beside the frozen backbone: what trains never sends a gradient through it.

Shapes: batch B, tokens T, hidden D, side width W.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Losses,
    Method,
    Published,
    Recipe,
    refuse_unusual_layers,
)
from unipelt_cli.methods.building_blocks import apply_linear, apply_norm, new_linear
from unipelt_cli.methods.partial.overlay import squared_gradients

TEMPERATURE = 0.1  # of the ladder's gates
NARROWEST = 8
_READERS = ("query", "key", "value", "intermediate")  # their columns are hidden units
_WRITERS = ("attention_output", "output")  # their rows are
Scores = Callable[[Tensor], Tensor]  # from a weight to what each of its entries counts


class SideLayer(nn.Module):
    """A narrow layer of BERT's kind; its units are named as `Layout` names the backbone's."""

    def __init__(
        self, width: int, inner: int, heads: int, dropout: float, generator: Generator
    ) -> None:
        super().__init__()
        self.heads = heads
        self.query = new_linear(width, width, generator)
        self.key = new_linear(width, width, generator)
        self.value = new_linear(width, width, generator)
        self.attention_output = new_linear(width, width, generator)
        self.attention_norm = nn.LayerNorm(width)
        self.intermediate = new_linear(width, inner, generator)
        self.output = new_linear(inner, width, generator)
        self.output_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, T, W), (B, 1, 1, T) -> (B, T, W)
        split = (*x.shape[:2], self.heads, -1)
        query, key, value = (
            apply_linear(unit, x).view(split).transpose(1, 2)
            for unit in (self.query, self.key, self.value)
        )
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = apply_linear(self.attention_output, context.transpose(1, 2).flatten(2))
        x = apply_norm(self.attention_norm, x + self.dropout(mixed))
        inner = functional.gelu(apply_linear(self.intermediate, x))
        return apply_norm(self.output_norm, x + self.dropout(apply_linear(self.output, inner)))

    def take_over(self, layer: nn.Module, layout: Layout, stream: Tensor, scores: Scores) -> None:
        """Copy the heaviest units of a backbone's layer; `stream` are the hidden units kept (W,).

        Every head keeps its own heaviest dimensions, so the side layer has the same heads.
        """
        score = {name: scores(_weight(layer, layout, name)) for name in _READERS + _WRITERS}
        matched = score["query"].sum(1) + score["key"].sum(1)
        carried = score["value"].sum(1) + score["attention_output"].sum(0)
        across = stream.numel() // self.heads
        matching, carrying = (
            _heaviest_of_each_head(mass, self.heads, across) for mass in (matched, carried)
        )
        mass = score["intermediate"].sum(1) + score["output"].sum(0)
        inner = _heaviest(mass, self.intermediate.out_features)
        places = {
            "query": (matching, stream),
            "key": (matching, stream),
            "value": (carrying, stream),
            "attention_output": (stream, carrying),
            "attention_norm": (stream,),
            "intermediate": (inner, stream),
            "output": (stream, inner),
            "output_norm": (stream,),
        }
        for name, (rows, *columns) in places.items():
            module, source = getattr(self, name), layer.get_submodule(getattr(layout, name))
            module.bias.copy_(cast(Tensor, source.bias)[rows])
            kept = cast(Tensor, source.weight)[rows]
            module.weight.copy_(kept[:, columns[0]] if columns else kept)


class Ladder(nn.Module):
    """The side network: one narrow layer beside each layer of the backbone."""

    def __init__(self, backbone: Any, method: "LadderSideTuning", site: AttachContext) -> None:
        super().__init__()
        layout, config, generator = site.layout, backbone.config, site.generator
        layers = layout.layer_list(backbone)
        hidden, heads = config.hidden_size, config.num_attention_heads
        inner = layers[0].get_submodule(layout.intermediate).out_features
        assert isinstance(inner, int)
        wanted = max(NARROWEST, hidden // method.reduction)
        width = min(hidden, heads * -(-wanted // heads))  # a multiple of the backbone's heads
        side_inner = min(inner, max(NARROWEST, inner // method.reduction))
        rate = getattr(config, "hidden_dropout_prob", None)  # DistilBERT calls it otherwise
        dropout = float(config.dropout if rate is None else rate)
        self.read = [index for index in range(len(layers)) if index not in method.drop]
        self.embedded = new_linear(hidden, width, generator)
        self.down = nn.ModuleList(new_linear(hidden, width, generator) for _ in self.read)
        self.layers = nn.ModuleList(
            SideLayer(width, side_inner, heads, dropout, generator) for _ in self.read
        )
        self.alpha = nn.Parameter(torch.zeros(len(self.read)))
        self.norm = nn.LayerNorm(width)
        self.up = new_linear(width, hidden, generator)
        self.side: Tensor | None = None  # (B, T, W) of this pass
        self.mask: Tensor | None = None  # (B, 1, 1, T), true for tokens
        self.rests = False  # whether the backbone answers for itself
        self.layout, self.selects = layout, method.initial_down == "selected"
        is_counted = _weight(layers[0], layout, "query").is_meta  # a skeleton has no weights
        if method.initial == "pruned" and not (site.folded or is_counted):
            self._take_over([layers[index] for index in self.read], torch.abs)
        backbone.register_forward_pre_hook(self._begin, with_kwargs=True)
        layers[0].register_forward_pre_hook(self._embed)
        for rung, index in enumerate(self.read):
            layers[index].register_forward_hook(_Rung(self, rung))
        backbone.register_forward_hook(self._finish)

    def take_over_by_fisher(self, backbone: nn.Module, losses: Iterator[Tensor]) -> None:
        """Keep the units of the largest squared gradients, as the backbone answers by itself."""
        layers, names = self.layout.layer_list(backbone), _READERS + _WRITERS
        read = [layers[index] for index in self.read]
        weights = [_weight(layer, self.layout, name) for layer in read for name in names]
        self.rests = True
        squares = squared_gradients(weights, losses)
        self.rests = False
        parts = torch.split(squares, [weight.numel() for weight in weights])
        pairs = zip(weights, parts, strict=True)
        fisher = {id(weight): part.view_as(weight) for weight, part in pairs}
        self._take_over(read, lambda weight: fisher[id(weight)])

    @torch.no_grad()
    def _take_over(self, layers: list[nn.Module], scores: Scores) -> None:
        """Start as the backbone without its lighter units: what is read is what was kept."""
        width = self.embedded.out_features
        mass = torch.stack(
            [
                scores(_weight(layer, self.layout, name)).sum(axis)
                for layer in layers
                for names, axis in ((_READERS, 0), (_WRITERS, 1))
                for name in names
            ]
        )
        stream = _heaviest(mass.sum(0), width)
        for side_layer, layer in zip(self.layers, layers, strict=True):
            assert isinstance(side_layer, SideLayer)
            side_layer.take_over(layer, self.layout, stream, scores)
        for down in (self.embedded, *self.down) if self.selects else ():
            assert isinstance(down, nn.Linear)
            nn.init.zeros_(down.weight)
            down.weight[torch.arange(width, device=stream.device), stream] = 1.0

    def _begin(self, backbone: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self.mask = kwargs["attention_mask"].bool()[:, None, None]

    def _embed(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.side = apply_linear(self.embedded, args[0].detach())

    def climb(self, rung: int, hidden: Tensor) -> None:
        """Take one rung: mix what the backbone's layer says into the side, and go on from there."""
        if self.rests:
            return
        assert self.side is not None
        gate = (self.alpha[rung] / TEMPERATURE).sigmoid().to(hidden.dtype)
        read = apply_linear(self.down[rung], hidden.detach())
        assert self.mask is not None
        self.side = self.layers[rung](gate * self.side + (1 - gate) * read, self.mask)

    def _finish(self, backbone: nn.Module, args: Any, output: Any) -> Any:
        if self.rests:
            return output
        assert self.side is not None
        answer = apply_linear(self.up, apply_norm(self.norm, self.side))
        self.side = self.mask = None
        return _replaced(backbone, output, answer)


class _Rung:
    """The hook that hands one layer's output to the ladder."""

    def __init__(self, ladder: Ladder, rung: int) -> None:
        self.ladder, self.rung = ladder, rung

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.ladder.climb(self.rung, output[0])


@dataclass(frozen=True, config=CHECKS)
class LadderSideTuning(Method):
    """LST: a narrow transformer that reads every layer of the backbone (arXiv 2206.06522).

    Unlike the authors' code it starts from the heaviest weights, not the largest Fisher (`initial`;
    0.800 against 0.745 on the demo's dev), with Down matrices that select what was kept
    (`initial_down`), and drops out neither attention weights nor what the last norm says.
    """

    reduction: Annotated[int, Field(ge=1, description="backbone's width over the side's")] = 8
    initial: Annotated[
        Literal["pruned", "fisher", "random"],
        Field(description="start from the heaviest units, the largest Fisher, or random numbers"),
    ] = "pruned"
    initial_down: Annotated[
        Literal["selected", "random"],
        Field(description="Down starts as what selects the units kept, or from random numbers"),
    ] = "selected"
    samples: Annotated[
        int, Field(ge=1, description="rows that the Fisher information is taken over, one by one")
    ] = 1024
    drop: Annotated[
        tuple[int, ...],
        BeforeValidator(
            lambda drop: tuple(map(int, drop.split(","))) if isinstance(drop, str) else drop
        ),
        Field(strict=False, description="layers without a side layer, counted from 0"),
    ] = ()

    @property
    def earlier(self) -> Mapping[str, Any]:
        return {"initial_down": "selected", "samples": 1024}

    def problems(self) -> Iterator[tuple[str, str]]:
        if any(index < 0 for index in self.drop):
            yield f"drop = {list(self.drop)}: layers count from 0", "name layers that there are"

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)
        layers = config.num_hidden_layers
        if not set(range(layers)) - set(self.drop):
            yield f"method.drop leaves none of its {layers} layers", "drop fewer"
        if beyond := [index for index in self.drop if index >= layers]:
            yield f"method.drop names {beyond}, and it has {layers} layers", "name layers it has"

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone.ladder = Ladder(backbone, self, site)

    def prepare(self, backbone: nn.Module, losses: Losses) -> None:
        if self.initial == "fisher":
            assert isinstance(backbone.ladder, Ladder)
            backbone.ladder.take_over_by_fisher(backbone, losses(1, self.samples))


class Side(nn.Module):
    """A copy of the backbone's lowest layers, blended with its output by one learned number."""

    def __init__(self, backbone: Any, method: "SideTuning", site: AttachContext) -> None:
        super().__init__()
        layers = site.layout.layer_list(backbone)
        self.layers = copy.deepcopy(layers[: method.layers]).requires_grad_(True)
        self.a = nn.Parameter(torch.full((1,), method.start))
        self.call: tuple[Any, Any] | None = None
        layers[0].register_forward_pre_hook(self._read, with_kwargs=True)
        backbone.register_forward_hook(self._finish)

    def _read(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.call = args, kwargs

    def _finish(self, backbone: nn.Module, args: Any, output: Any) -> Any:
        assert self.call is not None
        (hidden, *others), named = self.call
        self.call = None
        base = output.last_hidden_state
        with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
            for layer in self.layers:
                hidden = layer(hidden, *others, **named)[0]
        share = self.a.sigmoid().to(base.dtype)
        return _replaced(backbone, output, share * base + (1 - share) * hidden.to(base.dtype))


@dataclass(frozen=True, config=CHECKS)
class SideTuning(Method):
    """Blend the frozen backbone's output with a small network's (arXiv 1912.13503)."""

    layers: Annotated[int, Field(ge=1, description="layers of the side network")] = 2
    start: Annotated[
        float, Field(description="a at the start: the backbone's share is its sigmoid")
    ] = 4.0  # at 0 an untrained side takes half of what the backbone says
    copy_rate: Annotated[
        float, Field(gt=0, le=1, description="the copied layers' rate over the run's")
    ] = 0.03

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)
        if self.layers > config.num_hidden_layers:
            yield (
                f"method.layers = {self.layers}, and it has {config.num_hidden_layers} to copy",
                f"set method.layers={config.num_hidden_layers} or less",
            )

    def rate(self, name: str) -> float:
        """Train the copied layers as pretrained ones are trained: far slower than a new head."""
        return self.copy_rate if name.startswith("side.layers.") else 1.0

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone.side = Side(backbone, self, site)


METHODS: Mapping[str, Recipe] = MappingProxyType(
    {
        "lst": Recipe(
            LadderSideTuning(),
            1e-3,
            "additive",
            "a narrow side network that reads every layer; no gradient in the backbone",
            "Sung et al. 2022",
            published=Published(
                3e-3,
                {"epochs": 20, "batch_size": 100},
                {"initial": "fisher", "initial_down": "random"},
            ),
        ),
        "side-tuning": Recipe(
            SideTuning(),
            1e-3,
            "additive",
            "the frozen backbone blended with a trained copy of its lowest layers",
            "Zhang et al. 2020",
        ),
    }
)


def _weight(layer: nn.Module, layout: Layout, name: str) -> nn.Parameter:
    return cast(nn.Parameter, layer.get_submodule(getattr(layout, name)).weight)


def _heaviest(mass: Tensor, count: int) -> Tensor:
    """Return the places of the largest values, in their order."""
    return mass.topk(count).indices.sort().values


def _heaviest_of_each_head(mass: Tensor, heads: int, across: int) -> Tensor:
    """Return the places of each head's `across` largest values."""
    by_head = mass.view(heads, -1)
    kept = by_head.topk(across, dim=1).indices.sort(dim=1).values
    starts = torch.arange(heads, device=mass.device) * by_head.shape[1]
    return (kept + starts[:, None]).flatten()


def _replaced(backbone: Any, output: Any, hidden: Tensor) -> Any:
    """Put another last hidden state into a backbone's output, pooled anew where it pools."""
    output.last_hidden_state = hidden
    if getattr(backbone, "pooler", None) is not None:
        output.pooler_output = backbone.pooler(hidden)
    return output
