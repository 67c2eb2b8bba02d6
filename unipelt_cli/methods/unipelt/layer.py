"""The submodules and gates of one layer; its methods are hooks on the layer's modules."""

import inspect
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.building_blocks import Adapter, LowRank, ParallelAdapter, new_linear
from unipelt_cli.methods.unipelt.gates import open_gates
from unipelt_cli.methods.unipelt.settings import UnionSettings

THIRDS = ("query", "key", "value")
MASKS = frozenset({"attention_mask", "mask"})  # what attention modules call the mask they read


class ForwardState:
    """What the layers of one forward pass share; it belongs to no module and is not stored."""

    def __init__(self, prefix_length: int) -> None:
        self.prefix_length = prefix_length
        self.pooling: Tensor | None = None  # (B, T) float32, sums to 1 over the pooled tokens
        self.prefix: Tensor | None = None  # (N, 2, P, D), of N layers that have one
        self.is_fused = False  # whether fused layers compute this pass, and the hooks rest
        self.recorded: list[dict[str, Tensor]] | None = None  # a layer's gates, each (B,)
        self.recorded_sites: list[int] = []  # the layers in whose order they come
        self.task = 0  # whose gate terms count, where tasks have some
        self.closed: frozenset[tuple[int, str]] = frozenset()  # (layer, part) that rest


class LayerSubmodules(nn.Module):
    """The submodules and gates of one layer; its methods are the hooks on the layer's modules."""

    def __init__(
        self,
        layer: nn.Module,
        layout: Layout,
        method: UnionSettings,
        index: int,
        state: ForwardState,
        generator: Generator,
    ) -> None:
        super().__init__()
        self.index, self.state, self.scale = index, state, method.lora_factor
        without = [layer for layer, part in method.left_out if part == "prefix"]
        self.prefix_index = index - sum(layer < index for layer in without)
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
        lacks = {*layout.lacks, *(part for layer, part in method.left_out if layer == index)}
        self.parts = parts = tuple(part for part in method.parts if part not in lacks)
        if "adapter" in parts:
            bottleneck = max(1, hidden // method.reduction)
            self.adapter = Adapter(hidden, bottleneck, generator, method.adapter_std)
        if "parallel" in parts:
            width, dropout = method.parallel_bottleneck, method.parallel_dropout
            self.parallel = ParallelAdapter(hidden, width, generator, dropout)
        if "lora" in parts:
            for projection in ("query", "value"):
                self.lora[projection] = LowRank(
                    _projection(layer, layout, projection),
                    method.rank,
                    generator,
                    projection_width(layer, layout, projection),
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
        for projection in self.lora:
            module = _projection(layer, layout, projection)
            handles.append(module.register_forward_hook(getattr(self, f"_lora_{projection}")))
        for path in layout.biased() if len(self.bias) else ():
            shift = _Shift(self, path.replace(".", "-"))
            handles.append(layer.get_submodule(path).register_forward_hook(shift))
        if self.state.prefix_length and lengthens:
            for projection in ("key", "value"):
                module = _projection(layer, layout, projection)
                handles.append(module.register_forward_hook(getattr(self, f"_prefix_{projection}")))
            attention = layer.get_submodule(layout.attention)
            handles.append(attention.register_forward_pre_hook(self._shorten, with_kwargs=True))
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

    def is_closed(self, part: str) -> bool:
        """Say whether a part of this layer rests in this pass, as if it were not there."""
        return (self.index, part) in self.state.closed

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
        if self.state.is_fused:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        self.gate_values, self.record = {}, {}
        if self.state.recorded is not None:  # one entry a call: a module may serve several layers
            position = bisect_right(self.state.recorded_sites, self.index)
            self.state.recorded.insert(position, self.record)
            self.state.recorded_sites.insert(position, self.index)
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
                self.record[name] = value.detach()

    def _pool(self, names: list[str], x: Tensor, pooling: Tensor) -> Tensor:  # (B, gates)
        gates = [cast(nn.Linear, self.gates[name]) for name in names]
        weight = torch.cat([gate.weight for gate in gates])
        bias = torch.cat([gate.bias for gate in gates])
        if len(self.task_gates):
            added_gates = cast(nn.ModuleDict, self.task_gates[self.state.task])
            terms = [cast(nn.Linear, added_gates[name]) for name in names]
            weight = weight + torch.cat([term.weight for term in terms])
            bias = bias + torch.cat([term.bias for term in terms])
        return open_gates(x, weight, bias, pooling)

    def _lora_query(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._low_rank("query", args[0], output)

    def _lora_value(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._low_rank("value", args[0], output)

    def _low_rank(self, projection: str, x: Tensor, output: Tensor) -> Tensor:
        if self.is_closed("lora"):
            return output
        gate = self.gate("lora" if "lora" in self.gates else f"lora_{projection}", x)
        scale = self.scale if gate is None else gate.to(x.dtype) * self.scale
        added: Tensor = self.lora[projection](x, scale)
        if not self.fused:
            return output + added
        thirds = list(output.chunk(len(THIRDS), dim=-1))
        thirds[THIRDS.index(projection)] = thirds[THIRDS.index(projection)] + added
        return torch.cat(thirds, dim=-1)

    def _prefix_key(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._prepend(0, output)

    def _prefix_value(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._prepend(1, output)

    def _prepend(self, key_or_value: int, output: Tensor) -> Tensor:  # (B, T, D) -> (B, P + T, D)
        return torch.cat([self.prefix_rows(key_or_value, output), output], dim=1)

    def _shorten(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the columns of a closed prefix off the mask that this layer's attention reads."""
        if not self.is_closed("prefix"):
            return None
        bound = inspect.signature(attention.forward).bind(*args, **kwargs)
        for name in MASKS & bound.arguments.keys():
            mask = bound.arguments[name]
            if mask is not None:
                bound.arguments[name] = mask[..., self.state.prefix_length :]
        return bound.args, bound.kwargs

    def prefix_rows(self, key_or_value: int, projected: Tensor) -> Tensor:  # (B, T, D) -> (B, P, D)
        """Return the prefix's keys (0) or values (1) for projected tokens; of a closed one none."""
        if self.is_closed("prefix"):
            return projected[:, :0]
        assert self.state.prefix is not None
        rows = self.state.prefix[self.prefix_index, key_or_value].expand(projected.shape[0], -1, -1)
        gate = self.gate("prefix")
        if gate is not None:
            rows = gate * rows
        return rows.to(projected.dtype)

    def _read(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.read = args[0]

    def _add_parallel(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add to the block's output after its dropout; the sum with the residual is the same."""
        assert self.parallel is not None
        assert self.read is not None
        x, self.read = self.read, None
        if self.is_closed("parallel"):
            return args
        self._compute([name for name in self.gates if name == "parallel"], x)
        added = self.parallel(x) * self.parallel_scale
        gate = self.gate("parallel")
        return (args[0] + (added if gate is None else gate.to(added.dtype) * added),)

    def _adapt(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (summed,) = args
        if self.is_closed("adapter"):
            return args
        return (summed + self._adapted(norm.forward(summed)),)  # the frozen norm, without hooks

    def _adapt_output(self, block: nn.Module, args: Any, output: Any) -> Any:
        if self.is_closed("adapter"):
            return output
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
        for projection, low_rank in self.lora.items():
            assert isinstance(low_rank, LowRank)
            weight = _projection(layer, layout, projection).weight.detach()
            if layout.fused:
                weight = weight.chunk(len(THIRDS))[THIRDS.index(projection)]
            # In float64, which not every device has: summed in float32 its error shows in logits.
            w, b, a = (matrix.cpu().double() for matrix in (weight, low_rank.b, low_rank.a))
            weight.copy_(w + self.scale * b @ a)
        for name, delta in self.bias.items():
            bias = layer.get_submodule(name.replace("-", ".")).bias
            assert isinstance(bias, Tensor)
            bias += delta


class _Shift:
    """The hook that adds one bias delta to a module's output."""

    def __init__(self, owner: LayerSubmodules, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.owner.is_closed("bias"):
            return output
        delta: Tensor = self.owner.bias[self.name]
        gate = self.owner.gate("bias", args[0])
        return output + (delta if gate is None else gate * delta).to(output.dtype)


def projection_width(layer: nn.Module, layout: Layout, projection: str) -> int:
    """Return how many numbers a token's query, key or value has."""
    outputs = _projection(layer, layout, projection).out_features
    return outputs // len(THIRDS) if layout.fused else outputs


def _projection(layer: nn.Module, layout: Layout, projection: str) -> nn.Linear:
    linear = layer.get_submodule(getattr(layout, projection))
    assert isinstance(linear, nn.Linear)
    return linear
