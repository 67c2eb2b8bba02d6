"""Adapter, prefix, LoRA and others as submodules of every layer, each behind a learned gate.

Mao et al. 2022 (arXiv 2110.07577). The backbone's own modules stay in place: submodules reach
them through forward hooks, so the backbone's tensors keep their names and can be merged or freed.
Shapes: batch B, tokens T, hidden D, prefix length P, layers N, rank R, bottleneck M.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import field
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones import Layout
from unipelt_cli.methods.attention import replace_attention
from unipelt_cli.methods.base import CHECKS, Method, Recipe, Site, new_linear, refuse_unusual_layers
from unipelt_cli.methods.parts import Adapter, LowRank, ParallelAdapter, Prefix

THIRDS = ("query", "key", "value")
Part = Literal["adapter", "prefix", "lora", "bias", "parallel"]


class ForwardState:
    """What the layers of one forward pass share; it belongs to no module and is not stored."""

    def __init__(self, prefix_length: int) -> None:
        self.prefix_length = prefix_length
        self.pooling: Tensor | None = None  # (B, T) float32, sums to 1 over the pooled tokens
        self.prefix: Tensor | None = None  # (N, 2, P, D)
        self.recorded: list[dict[str, Tensor]] | None = None  # a layer's gates, each (B,)
        self.task = 0  # whose gate terms count, where tasks have some


class LayerSubmodules(nn.Module):
    """The submodules and gates of one layer; its methods are the hooks on the layer's modules."""

    def __init__(
        self,
        layer: nn.Module,
        layout: Layout,
        method: "Submodules",
        index: int,
        state: ForwardState,
        generator: Generator,
    ) -> None:
        super().__init__()
        self.index, self.state, self.scale = (
            index,
            state,
            2.0 if method.lora_scale is None else method.lora_scale,
        )
        self.gate_values: dict[str, Tensor] = {}
        self.record: dict[str, Tensor] = {}
        self.fused = layout.fused
        self.reads_table = False
        self.lora, self.bias, self.gates = nn.ModuleDict(), nn.ParameterDict(), nn.ModuleDict()
        self.task_gates = nn.ModuleList()  # by task, then by gate: what it adds to the shared gate
        self.adapter: Adapter | None = None
        self.parallel: ParallelAdapter | None = None
        self.parallel_scale = method.parallel_scale
        self.read: Tensor | None = None  # what the feed-forward block reads in this pass
        query = layer.get_submodule(layout.query)
        assert isinstance(query, nn.Linear)
        hidden = query.in_features
        parts = [part for part in method.parts if part not in layout.lacks]
        if "adapter" in parts:
            self.adapter = Adapter(hidden, max(1, hidden // method.reduction), generator)
        if "parallel" in parts:
            self.parallel = ParallelAdapter(hidden, method.parallel_bottleneck, generator)
        if "lora" in parts:
            for place in ("query", "value"):
                self.lora[place] = LowRank(
                    _projection(layer, layout, place),
                    method.rank,
                    generator,
                    _width(layer, layout, place),
                )
        if "bias" in parts:
            for path in layout.biased():
                bias = layer.get_submodule(path).bias
                assert isinstance(bias, Tensor)
                self.bias[path.replace(".", "-")] = nn.Parameter(torch.zeros_like(bias))
        for name in method.gate_names(parts):
            self.gates[name] = gate = new_linear(hidden, 1, generator)
            nn.init.constant_(gate.bias, method.gate_bias)

    def hooks(
        self, layer: nn.Module, layout: Layout, lengthens: bool
    ) -> list[torch.utils.hooks.RemovableHandle]:
        """Register this layer's hooks; the order is LoRA, bias, prefix on one projection.

        With `lengthens` the projections bring the prefix; otherwise an own attention does.
        """
        reads = layer.get_submodule(layout.gates_read)
        handles = [reads.register_forward_pre_hook(self._open_gates, with_kwargs=True)]
        for place in self.lora:
            module = _projection(layer, layout, place)
            handles.append(module.register_forward_hook(getattr(self, f"_lora_{place}")))
        for path in layout.biased() if len(self.bias) else ():
            shift = _Shift(self, path.replace(".", "-"))
            handles.append(layer.get_submodule(path).register_forward_hook(shift))
        if self.state.prefix_length and lengthens:
            for place in ("key", "value"):
                module = _projection(layer, layout, place)
                handles.append(module.register_forward_hook(getattr(self, f"_prefix_{place}")))
        if self.parallel is not None:
            norm = layer.get_submodule(layout.output_norm)
            block = layer.get_submodule(layout.intermediate)
            handles.append(block.register_forward_pre_hook(self._read))
            handles.append(norm.register_forward_pre_hook(self._add_parallel))
        if layout.table is not None and len(self.gates):
            attention = layer.get_submodule(layout.attention)
            project = getattr(attention, layout.table)
            setattr(attention, layout.table, partial(self._read_table, project))
        if self.adapter is not None and layout.adapted is not None:
            block = layer.get_submodule(layout.adapted)
            handles.append(block.register_forward_hook(self._adapt_output))
        elif self.adapter is not None:
            norm = layer.get_submodule(layout.output_norm)
            handles.append(norm.register_forward_pre_hook(self._adapt))
        return handles

    def gate(self, name: str, x: Tensor | None = None) -> Tensor | None:
        """Return a gate's value in this pass, (B, 1, 1), or None where nothing is gated.

        A table of positions x, (1, S, D), belongs to no sentence: its gate is its own plain mean.
        """
        if self.reads_table and x is not None and name in self.gates:
            return self._pool([name], x, x.new_full(x.shape[:2], 1 / x.shape[1]).float())[
                :, :, None
            ]
        value = self.gate_values.get(name)
        return None if value is None else value[:, None, None]

    def _read_table(self, project: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run the function that sends the table of positions through query and key."""
        self.reads_table = True
        try:
            return project(*args, **kwargs)
        finally:
            self.reads_table = False

    def _open_gates(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.gate_values, self.record = {}, {}
        if self.state.recorded is not None:  # one entry a call: a module may serve several layers
            self.state.recorded.append(self.record)
        late = ("adapter", "parallel")
        self._compute([name for name in self.gates if name not in late], hidden)

    def _compute(self, names: list[str], x: Tensor) -> None:
        """Pool sigmoid(w.x + b) over tokens: one scalar an example, always in float32."""
        if not names:
            return
        pooling = self.state.pooling
        assert pooling is not None, "a gate needs the attention mask"
        values = self._pool(names, x, pooling)
        for name, value in zip(names, values.unbind(1), strict=True):
            self.gate_values[name] = value
            if self.state.recorded is not None:
                self.record[name] = value.detach().cpu()

    def _pool(self, names: list[str], x: Tensor, pooling: Tensor) -> Tensor:  # (B, gates)
        gates = [cast(nn.Linear, self.gates[name]) for name in names]
        weight = torch.cat([gate.weight for gate in gates])
        bias = torch.cat([gate.bias for gate in gates])
        if len(self.task_gates):
            own = cast(nn.ModuleDict, self.task_gates[self.state.task])
            terms = [cast(nn.Linear, own[name]) for name in names]
            weight = weight + torch.cat([term.weight for term in terms])
            bias = bias + torch.cat([term.bias for term in terms])
        with torch.autocast(x.device.type, enabled=False):
            opened = functional.linear(x.float(), weight, bias).sigmoid()  # (B, T, gates)
            return (opened * pooling[:, :, None]).sum(1)

    def _lora_query(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._low_rank("query", args[0], output)

    def _lora_value(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._low_rank("value", args[0], output)

    def _low_rank(self, place: str, x: Tensor, output: Tensor) -> Tensor:
        gate = self.gate("lora" if "lora" in self.gates else f"lora_{place}", x)
        scale = self.scale if gate is None else gate.to(x.dtype)
        added: Tensor = self.lora[place](x, scale)
        if not self.fused:
            return output + added
        thirds = list(output.chunk(len(THIRDS), dim=-1))
        thirds[THIRDS.index(place)] = thirds[THIRDS.index(place)] + added
        return torch.cat(thirds, dim=-1)

    def _prefix_key(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._prepend(0, output)

    def _prefix_value(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._prepend(1, output)

    def _prepend(self, place: int, output: Tensor) -> Tensor:  # (B, T, D) -> (B, P + T, D)
        return torch.cat([self.prefix_rows(place, output), output], dim=1)

    def prefix_rows(self, place: int, projected: Tensor) -> Tensor:  # (B, T, D) -> (B, P, D)
        """Return the prefix's keys (0) or values (1) for projected tokens."""
        assert self.state.prefix is not None
        rows = self.state.prefix[self.index, place].expand(projected.shape[0], -1, -1)
        gate = self.gate("prefix")
        if gate is not None:
            rows = gate * rows
        return rows.to(projected.dtype)

    def _read(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.read = args[0]

    def _add_parallel(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Add to the block's output after its dropout; the sum with the residual is the same."""
        assert self.parallel is not None
        assert self.read is not None
        x, self.read = self.read, None
        self._compute([name for name in self.gates if name == "parallel"], x)
        added = self.parallel(x) * self.parallel_scale
        gate = self.gate("parallel")
        return (args[0] + (added if gate is None else gate.to(added.dtype) * added),)

    def _adapt(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (summed,) = args
        return (summed + self._adapted(norm.forward(summed)),)  # the frozen norm, without hooks

    def _adapt_output(self, block: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + self._adapted(output[0]), *output[1:])
        return output + self._adapted(output)

    def _adapted(self, x: Tensor) -> Tensor:
        """Return what the adapter adds, as far as its gate is open."""
        self._compute([name for name in self.gates if name == "adapter"], x)
        assert self.adapter is not None
        added: Tensor = self.adapter(x)
        gate = self.gate("adapter")
        return added if gate is None else gate.to(added.dtype) * added

    def merge_into(self, layer: nn.Module, layout: Layout) -> None:
        """Add the LoRA products and bias deltas to the layer's own tensors (ungated only)."""
        for place, low_rank in self.lora.items():
            assert isinstance(low_rank, LowRank)
            weight = _projection(layer, layout, place).weight.detach()
            if layout.fused:
                weight = weight.chunk(len(THIRDS))[THIRDS.index(place)]
            weight += self.scale * low_rank.b @ low_rank.a
        for name, delta in self.bias.items():
            bias = layer.get_submodule(name.replace("-", ".")).bias
            assert isinstance(bias, Tensor)
            bias += delta


class _Shift:
    """The hook that adds one bias delta to a module's output."""

    def __init__(self, owner: LayerSubmodules, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        delta: Tensor = self.owner.bias[self.name]
        gate = self.owner.gate("bias", args[0])
        return output + (delta if gate is None else gate * delta).to(output.dtype)


class Container(nn.Module):
    """All submodules of a backbone: `backbone.submodules`."""

    def __init__(
        self,
        backbone: nn.Module,
        method: "Submodules",
        site: Site,
    ) -> None:
        super().__init__()
        layout, generator = site.layout, site.generator
        self.layout = layout
        self.sites = layout.sites(backbone)
        has_prefix = "prefix" in method.parts
        self.state = ForwardState(method.prefix_length if has_prefix else 0)
        self.masked = method.gate_pooling == "masked"
        implementation = str(getattr(backbone.config, "_attn_implementation", "eager"))
        self.lengthens = has_prefix and implementation not in layout.own_attention
        self.layers = nn.ModuleList(
            LayerSubmodules(layer, row, method, index, self.state, generator)
            for index, (row, layer) in enumerate(self.sites)
        )
        self.prefix: Prefix | None = None
        if has_prefix:
            hidden = _width(self.sites[0][1], layout, "key")
            shape = (len(self.sites), method.prefix_length, hidden)
            self.prefix = Prefix(shape, method.prefix_width, generator, site.folded)
            if not self.lengthens:
                for (row, layer), own in zip(self.sites, self.layers, strict=True):
                    assert isinstance(own, LayerSubmodules)
                    module = layer.get_submodule(row.attention)
                    kind = layout.model_type, implementation
                    replace_attention(module, *kind, own.prefix_rows)
        self.handles = [backbone.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for (row, layer), own in zip(self.sites, self.layers, strict=True):
            assert isinstance(own, LayerSubmodules)
            self.handles += own.hooks(layer, row, self.lengthens)

    def _begin(self, backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before each forward pass: pool over the mask, make the prefix, lengthen the mask."""
        mask = kwargs["attention_mask"]
        pooled = mask.float() if self.masked else torch.ones_like(mask, dtype=torch.float32)
        self.state.pooling = pooled / pooled.sum(1, keepdim=True)
        if self.state.recorded is not None:
            self.state.recorded.clear()
        if self.prefix is not None:
            self.state.prefix = self.prefix()
        if self.lengthens:
            lengthened = functional.pad(mask, (self.state.prefix_length, 0), value=1)
            kwargs = {**kwargs, "attention_mask": lengthened}
        return args, kwargs


@dataclass(frozen=True, config=CHECKS)
class Submodules(Method):
    """Any union of adapter, prefix, LoRA, bias and parallel adapter, with or without gates."""

    parts: Annotated[
        tuple[Part, ...],
        BeforeValidator(lambda parts: tuple(parts.split(",")) if isinstance(parts, str) else parts),
        Field(strict=False, min_length=1, description="adapter, prefix, lora, bias, parallel"),
    ] = ("adapter", "prefix", "lora")
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
        float | None, Field(gt=0, description="LoRA without a gate: alpha / rank (2 if unset)")
    ] = field(default=None)
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
        if self.gated and self.lora_scale is not None:
            yield (
                f"lora_scale = {self.lora_scale}: has no effect, the gate takes its place",
                "leave it out, or set method.gated=false",
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
    def pads_to_max_length(self) -> bool:
        return self.gated and self.gate_pooling == "all"

    def rate(self, name: str) -> float:
        """Return the factor of the part that a tensor belongs to; gates follow the run's rate."""
        _, place, *rest = name.split(".")
        part = place if place == "prefix" else rest[1]
        return cast(float, getattr(self, f"{part}_rate", 1.0))

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

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return the trained tensors with the prefix MLP folded away, which is exact."""
        container = _container(backbone)
        stored = {
            name: tensor
            for name, tensor in super().fold(backbone).items()
            if not name.startswith("submodules.prefix.")
        }
        if container.prefix is not None:
            with torch.no_grad():
                stored["submodules.prefix.rows"] = container.prefix().contiguous()
        return stored

    @property
    def unmergeable(self) -> str | None:
        if self.gated:
            return "its gates depend on the input"
        if kept := {"adapter", "prefix", "parallel"} & set(self.parts):
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
        del backbone.submodules


_NAMES = {"parallel": "parallel adapter"}
_MAO = "Mao et al. 2022"
METHODS = MappingProxyType(
    {
        "unipelt-ap": Recipe(
            Submodules(("adapter", "prefix")), 5e-4, "hybrid", "adapter + prefix, gated", _MAO
        ),
        "unipelt-apl": Recipe(Submodules(), 5e-4, "hybrid", "adapter + prefix + LoRA, gated", _MAO),
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
            1e-4,
            "additive",
            "one bottleneck a layer, after the feed-forward block",
            "Pfeiffer et al. 2021",
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
    when the backbone has no gates.
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


def _container(backbone: nn.Module) -> Container:
    container = backbone.submodules
    assert isinstance(container, Container)
    return container


def _width(layer: nn.Module, layout: Layout, place: str) -> int:
    """Return how many numbers a token's query, key or value has."""
    outputs = _projection(layer, layout, place).out_features
    return outputs // len(THIRDS) if layout.fused else outputs


def _projection(layer: nn.Module, layout: Layout, place: str) -> nn.Linear:
    linear = layer.get_submodule(getattr(layout, place))
    assert isinstance(linear, nn.Linear)
    return linear
