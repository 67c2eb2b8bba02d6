"""Adapter, prefix, LoRA and others as submodules of every layer, each behind a learned gate.

Mao et al. 2022 (arXiv 2110.07577): the hyperparameters of every union, and the table of them.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unipelt_cli.backbones.architectures import Layout
from unipelt_cli.methods.base import (
    CHECKS,
    Gates,
    LowRankUpdates,
    Method,
    NoKnownForm,
    Recipe,
    Site,
    refuse_unusual_layers,
)
from unipelt_cli.methods.building_blocks import LowRank
from unipelt_cli.methods.unipelt.fused.stack import PARTS, Stack
from unipelt_cli.methods.unipelt.layer import THIRDS, Container, LayerSubmodules
from unipelt_cli.system.row_threads import shared_out

Part = Literal["adapter", "prefix", "lora", "bias", "parallel"]
MERGEABLE = frozenset({"lora", "bias"})
"""The parts that a plain backbone's weights can hold, where no gate opens them."""


def _listed(value: Any) -> Any:
    """Take a list apart that was written as one word with commas."""
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


@dataclass(frozen=True, config=CHECKS)
class Submodules(Method):
    """Any union of adapter, prefix, LoRA, bias and parallel adapter, with or without gates."""

    parts: Annotated[
        tuple[Part, ...],
        BeforeValidator(_listed),
        Field(strict=False, min_length=1, description="adapter, prefix, lora, bias, parallel"),
    ] = ("adapter", "prefix", "lora")
    leave_out: Annotated[
        tuple[str, ...],
        BeforeValidator(_listed),
        Field(strict=False, description="parts of layers that are not there: adapter.0, lora.3"),
    ] = ()
    gated: Annotated[bool, Field(description="whether a gate decides how far each part opens")] = (
        True
    )
    reduction: Annotated[int, Field(ge=1, description="adapter: hidden size over bottleneck")] = 16
    prefix_length: Annotated[int, Field(ge=1, le=256, description="prefix rows a layer")] = 10
    prefix_width: Annotated[int, Field(ge=1, description="prefix: width of its MLP")] = 512
    parallel_bottleneck: Annotated[
        int, Field(ge=1, description="parallel adapter: width of its bottleneck")
    ] = 16
    parallel_scale: Annotated[
        float, Field(gt=0, description="parallel adapter: factor on what it adds")
    ] = 2.0
    rank: Annotated[int, Field(ge=1, le=1024, description="LoRA: rank")] = 8
    lora_scale: Annotated[
        float | None,
        Field(gt=0, description="LoRA: alpha / rank, times its gate (unset: 1 with one, else 2)"),
    ] = field(default=None)
    adapter_std: Annotated[
        float, Field(ge=0, le=1, description="adapter: how widely its up matrix starts; 0: nothing")
    ] = 0.02
    prefix_std: Annotated[
        float, Field(gt=0, le=10, description="prefix: how widely its table starts")
    ] = 0.02
    gate_pooling: Annotated[
        Literal["masked", "all"],
        Field(description="average gates over tokens, or over padding too (the authors' code)"),
    ] = "masked"
    lora_gates: Annotated[
        Literal["shared", "separate"],
        Field(description="one LoRA gate a layer (the paper), or one for query and one for value"),
    ] = "shared"
    gate_bias: Annotated[
        float, Field(description="bias that every gate starts with: 0 is half open")
    ] = 0.0
    adapter_rate: Annotated[float, Field(gt=0, description="adapter: factor on the rate")] = 1.0
    prefix_rate: Annotated[float, Field(gt=0, description="prefix: factor on the rate")] = 1.0
    lora_rate: Annotated[float, Field(gt=0, description="LoRA: factor on the rate")] = 1.0
    bias_rate: Annotated[float, Field(gt=0, description="biases: factor on the rate")] = 1.0
    parallel_rate: Annotated[
        float, Field(gt=0, description="parallel adapter: factor on the rate")
    ] = 1.0

    def problems(self) -> Iterator[tuple[str, str]]:
        if len(set(self.parts)) < len(self.parts):
            yield f"parts = {list(self.parts)}: a part is named twice", "name each part once"
        for place in self.leave_out:
            part, _, layer = place.partition(".")
            if part not in self.parts or not (layer.isascii() and layer.isdigit()):
                yield (
                    f"leave_out = {list(self.leave_out)}: {place!r} is no part of a layer",
                    f"name one as {self.parts[0]}.0: a part of this method, and a layer from 0 on",
                )
        if not self.gated and self.gate_pooling == "all":
            yield "gate_pooling = 'all': there is no gate", "leave it out, or set method.gated=true"
        if not self.gated and self.gate_bias != 0:
            yield (
                f"gate_bias = {self.gate_bias}: there is no gate",
                "leave it out, or set method.gated=true",
            )

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        if "parallel" in self.parts:
            yield from refuse_unusual_layers(layout)
        for part in self.parts:
            if part in layout.lacks:
                yield (
                    f"it has the part {part!r}, and {layout.lacks[part]}",
                    f"set method.parts to some of {', '.join(layout.parts)}, "
                    "or choose another backbone",
                )

    @property
    def left_out(self) -> frozenset[tuple[int, str]]:
        """The (layer, part) places that have no submodule."""
        pairs = (place.split(".") for place in self.leave_out)
        return frozenset((int(layer), part) for part, layer in pairs)

    @property
    def submodules(self) -> tuple[str, ...]:
        return self.parts

    @property
    def pads_to_max_length(self) -> bool:
        return self.gated and self.gate_pooling == "all"

    def rate(self, name: str) -> float:
        """Return the factor of the part that a tensor belongs to; gates follow the run's rate."""
        _, place, *rest = name.split(".")
        part = place if place == "prefix" else rest[1]
        return cast(float, getattr(self, f"{part}_rate", 1.0))

    @property
    def lora_factor(self) -> float:
        """What LoRA's product is multiplied by, beside its gate if it has one."""
        if self.lora_scale is not None:
            return self.lora_scale
        return 1.0 if self.gated else 2.0

    def gate_names(self, parts: Iterable[str]) -> tuple[str, ...]:
        """Return the names of the gates of a layer with some of the parts."""
        if not self.gated:
            return ()
        separate = self.lora_gates == "separate"
        return tuple(
            name
            for part in parts
            for name in (("lora_query", "lora_value") if part == "lora" and separate else (part,))
        )

    def attach(self, backbone: nn.Module, site: Site) -> None:
        backbone.submodules = Container(backbone, self, site)

    def hasten(self, backbone: nn.Module, site: Site) -> bool:
        """Put fused layers in the library's place where they compute the same."""
        layout, config = site.layout, cast(Any, backbone.config)
        container = _container(backbone)
        fits = (
            layout.is_plain
            and layout.has_plain_scores
            and not self.leave_out
            and getattr(config, layout.activation, None) == "gelu"
            and PARTS.issuperset(self.parts)
            and self.gate_pooling == "masked"
            and not any(len(cast(LayerSubmodules, own).task_gates) for own in container.layers)
        )
        if fits:
            container.stack = Stack(backbone, container, self.lora_factor, is_stored=site.folded)
        return fits

    def joint(self, backbone: nn.Module) -> Stack | None:
        """Return the fused layers, where they are in place."""
        return _container(backbone).stack

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return the trained tensors with the prefix MLP folded away, which is exact."""
        container = _container(backbone)
        stored = {
            name: tensor
            for name, tensor in super().fold(backbone).items()
            if not name.startswith("submodules.prefix.")
        }
        if container.prefix is not None:
            # With as many threads as in a pass: other sums would be other numbers in bf16.
            with torch.no_grad(), shared_out(container.stack is not None):
                stored["submodules.prefix.rows"] = container.prefix().contiguous()
        return stored

    def known_form(
        self, backbone: nn.Module, part: str | None = None, gates: Gates = ()
    ) -> LowRankUpdates:
        """Return LoRA alone as what it is, and what stands beside it only if asked for a part."""
        if part is None and self.gated:
            raise NoKnownForm("its gates depend on the input")
        if part is None and self.parts == ("prefix",):
            raise NoKnownForm("PEFT's prefix moves a row's positions, and this one does not")
        if part is None and self.parts != ("lora",):
            names = [_NAMES.get(name, name) for name in self.parts if name != "lora"]
            raise NoKnownForm(f"PEFT does not have its {' and '.join(names)}")
        if part not in (None, "lora"):
            raise NoKnownForm(f"of UniPELT's parts PEFT has lora, not {part!r}")
        if "lora" not in self.parts:
            raise NoKnownForm("it has no LoRA")
        if any(part == "lora" for _, part in self.left_out):
            raise NoKnownForm("some of its layers have no LoRA")
        return _low_rank_updates(_container(backbone), backbone, gates)

    @property
    def unmergeable(self) -> str | None:
        if self.gated:
            return "its gates depend on the input"
        if kept := set(self.parts) - MERGEABLE:
            names = [_NAMES.get(part, part) for part in sorted(kept)]
            return f"no plain weight computes what its {' and '.join(names)} does"
        return None

    def merge(self, backbone: nn.Module) -> None:
        """Add ungated LoRA and biases to the weights they stand beside, in float32."""
        super().merge(backbone)
        container = _container(backbone)
        with torch.no_grad():
            for (row, layer), own in zip(container.sites, container.layers, strict=True):
                assert isinstance(own, LayerSubmodules)
                own.merge_into(layer, row)
        for handle in container.handles:
            handle.remove()
        if container.stack is not None:
            container.stack.leave()
        del backbone.submodules


_NAMES = {"parallel": "parallel adapter"}
_MAO = "Mao et al. 2022"
METHODS = MappingProxyType(
    {
        "unipelt-ap": Recipe(
            Submodules(("adapter", "prefix")), 5e-4, "hybrid", "adapter + prefix, gated", _MAO, True
        ),
        "unipelt-apl": Recipe(
            Submodules(), 5e-4, "hybrid", "adapter + prefix + LoRA, gated", _MAO, True
        ),
        "unipelt-aplb": Recipe(
            Submodules(("adapter", "prefix", "lora", "bias")),
            5e-4,
            "hybrid",
            "adapter + prefix + LoRA + bias, gated",
            "ours, after Mao et al. 2022",
        ),
        "ap-ungated": Recipe(
            Submodules(("adapter", "prefix"), gated=False),
            5e-4,
            "hybrid",
            "the control of unipelt-ap",
            _MAO,
        ),
        "apl-ungated": Recipe(
            Submodules(gated=False), 5e-4, "hybrid", "the control of unipelt-apl", _MAO
        ),
        "adapter": Recipe(
            Submodules(("adapter",), gated=False),
            1e-3,
            "additive",
            "one bottleneck a layer, after the feed-forward block",
            "Pfeiffer et al. 2021",
            True,
        ),
        "prefix": Recipe(
            Submodules(("prefix",), gated=False),
            2e-4,
            "additive",
            "learned keys and values in every layer",
            "Li and Liang 2021",
        ),
        "lora": Recipe(
            Submodules(("lora",), gated=False),
            5e-4,
            "reparameterised",
            "low-rank updates of query and value",
            "Hu et al. 2022",
            True,
        ),
        "parallel-adapter": Recipe(
            Submodules(("parallel",), gated=False),
            1e-3,
            "additive",
            "one scaled bottleneck a layer, beside the feed-forward block",
            "He et al. 2022",
        ),
        "mam": Recipe(
            Submodules(("prefix", "parallel"), gated=False, prefix_length=16),
            1e-3,
            "hybrid",
            "prefix + scaled parallel adapter",
            "He et al. 2022",
        ),
        "union": Recipe(
            Submodules(),
            5e-4,
            "hybrid",
            "whichever parts you name, gated or not",
            "ours, after Mao et al. 2022",
        ),
    }
)


@contextmanager
def record_gates(backbone: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """Collect the gates of the latest forward pass: a list by layer of {gate: (batch,) values}.

    A module that serves several layers has an entry for each. The list, or its entries, stay empty
    when the backbone has no gates. Values stay on the device, float32.
    """
    container = getattr(backbone, "submodules", None)
    recorded: list[dict[str, Tensor]] = []
    if not isinstance(container, Container):
        yield recorded
        return
    container.state.recorded = recorded
    try:
        yield recorded
    finally:
        container.state.recorded = None


def places(backbone: nn.Module) -> list[tuple[int, str]]:
    """Return every (layer, part) of a union, which `closed` can close; () for what is no union."""
    container = getattr(backbone, "submodules", None)
    if not isinstance(container, Container):
        return []
    return [
        (layer, part)
        for layer, own in enumerate(container.layers)
        for part in cast(LayerSubmodules, own).parts
    ]


@contextmanager
def closed(backbone: nn.Module, places: Collection[tuple[int, str]]) -> Iterator[None]:
    """Inside, some submodules of a union rest: each (layer, part) is as if it were not there.

    A prefix is not zero rows then, which would still take attention, but none.
    """
    state = _container(backbone).state
    before, state.closed = state.closed, state.closed.union(places)
    try:
        yield
    finally:
        state.closed = before


def _container(backbone: nn.Module) -> Container:
    container = backbone.submodules
    assert isinstance(container, Container)
    return container


def _low_rank_updates(container: Container, backbone: nn.Module, gates: Gates) -> LowRankUpdates:
    """Return the LoRA of every layer; where they are gated, its gate's value is in B."""
    layout, layers = container.layout, cast(Sequence[LayerSubmodules], container.layers)
    rows = (layout, *layout.more)
    sites = [(row, path) for row in rows for path in row.layer_paths(backbone)]
    if gates and (layout.more or len(gates) != len(sites)):
        raise NoKnownForm(f"in {layout.model_type} not every layer has a gate of its own")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for place, ((row, path), own) in enumerate(zip(sites, layers, strict=True)):
        found = _pairs(own, gates[place] if gates else {})
        if row.fused:
            found = {"query": _fused(found)}
        pairs |= {f"{path}.{getattr(row, name)}": pair for name, pair in found.items()}
    rank = len(next(iter(pairs.values()))[0])
    return LowRankUpdates(rank, layers[0].scale, pairs)


def _pairs(own: LayerSubmodules, gates: Mapping[str, float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a layer's A and B by projection, with its gate's value in B if there is one."""
    found = {}
    for name, low_rank in own.lora.items():
        assert isinstance(low_rank, LowRank)
        gate = gates.get("lora", gates.get(f"lora_{name}", 1.0))
        found[name] = low_rank.a.detach(), gate * low_rank.b.detach()
    return found


def _fused(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return one pair for the unit whose output is in thirds: ranks stand beside each other."""
    columns = []
    for name, (_, b) in pairs.items():
        thirds = [b if name == third else torch.zeros_like(b) for third in THIRDS]
        columns.append(torch.cat(thirds))
    return torch.cat([a for a, _ in pairs.values()]), torch.cat(columns, dim=1)
