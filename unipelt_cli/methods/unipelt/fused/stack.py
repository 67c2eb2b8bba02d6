"""The fused layers in the place of the library's: entry, exit, autograd."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unipelt_cli.backbones.dropout import DropoutSource
from unipelt_cli.methods.unipelt.container import Container
from unipelt_cli.methods.unipelt.fused.batching import row_group, share_out
from unipelt_cli.methods.unipelt.fused.layer import FusedLayer, state_of
from unipelt_cli.methods.unipelt.fused.tensors import (
    EARLY,
    GATES,
    Masks,
    RowGroup,
    Tensors,
    Trained,
    make_ready,
    part_gradients,
    stack,
    sum_by_run,
    with_closed,
)
from unipelt_cli.methods.unipelt.layer import LayerSubmodules
from unipelt_cli.system.row_threads import run_parts

PARTS = frozenset({"adapter", "prefix", "lora"})
WATCHED = ("output_attentions", "output_hidden_states")  # what only the library's layers give


@dataclass
class RowGroupPass:
    """One part's way through the layers: what `backward` needs of it."""

    part: RowGroup
    masks: Sequence[Masks] | None  # a layer's each, where gradients are wanted
    saved: list[Tensors] = field(default_factory=list)


class Stack:
    """The fused layers of a backbone with the submodules of one run, or of several `together`."""

    def __init__(
        self, backbone: Any, container: Container, scale: float, *, is_stored: bool
    ) -> None:
        self.layers = [FusedLayer(layer, row) for row, layer in container.sites]
        self.container, self.runs = container, [self]
        self.counts: list[int] | None = None
        self.trained = {  # named once: looking for parameters takes longer than using them
            (layer_index, name): parameter
            for layer_index, layer in enumerate(container.layers)
            for name, parameter in layer.named_parameters()
        }
        self.heads = int(backbone.config.num_attention_heads)
        self.scale, self.is_stored = scale, is_stored
        self.kept: tuple[tuple[object, ...], list[Trained]] | None = None
        self.mask: Tensor | None = None  # of the pass that the stack computes, else None
        sources = (dropout.draws for layer in self.layers for dropout in layer.dropouts if dropout)
        self.draws = next(sources, DropoutSource())  # this run's, whoever lends the layers
        for layer_index, (_, layer) in enumerate(container.sites):
            layer.forward = partial(self._forward, layer_index, layer.forward)

    def leave(self) -> None:
        """Give the layers back to the library."""
        for _, layer in self.container.sites:
            del layer.forward

    def lend(self, other: "Stack") -> None:
        """Let another run's passes read the frozen tensors of this one."""
        other.layers = self.layers

    @contextmanager
    def together(self, runs: Sequence["Stack"], counts: Sequence[int]) -> Iterator[None]:
        """Inside, a batch holds so many rows of each run, one run after another."""
        before = self.runs, self.counts
        self.runs, self.counts = list(runs), list(counts)
        try:
            yield
        finally:
            self.runs, self.counts = before

    def begin(self, inputs: Mapping[str, Any]) -> bool:
        """Take up a pass with these inputs, if it is one that can be computed exactly."""
        mask = inputs["attention_mask"]
        state = self.container.state
        is_watched = any(map(inputs.get, WATCHED))
        if torch.is_grad_enabled():  # a pass without gradients records and closes by itself
            is_watched |= state.recorded is not None or bool(state.closed)
        is_exact = not is_watched and all(layer.is_current for layer in self.layers)
        is_exact = is_exact and not torch.is_autocast_enabled(mask.device.type)
        if not is_exact and len(self.runs) > 1:
            raise RuntimeError("several runs in one pass, and the backbone's tensors were replaced")
        self.mask = mask if is_exact else None
        return is_exact

    def _forward(
        self,
        layer_index: int,
        original: Callable[..., Any],
        hidden: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.mask is None:
            return original(hidden, *args, **kwargs)
        mask = self.mask
        if layer_index in (0, len(self.layers) - 1):
            self.mask = None  # a pass that fails, or the next one, is not ours
        if layer_index == 0:
            hidden = self._encode(hidden, mask)
            self.mask = mask if len(self.layers) > 1 else None
        return (hidden,)

    def _encode(self, hidden: Tensor, mask: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        group_passes = self._group_passes(hidden, mask)
        state = self.container.state
        if not torch.is_grad_enabled():
            output = self.run(
                hidden, group_passes, with_closed(self._kept(hidden.dtype), state.closed)
            )
            if state.recorded is not None:
                state.recorded[:] = self._gates(group_passes)
            return output
        self.kept = None
        names, tensors = zip(*self._tensors(), strict=True)
        encode: Any = _Encode.apply
        return cast(Tensor, encode(self, group_passes, names, hidden, *tensors))

    def _gates(self, group_passes: Sequence[RowGroupPass]) -> Iterator[Tensors]:
        """Yield the gates of a pass as the hooks record them: by layer, each (N,)."""
        order = torch.cat([group_pass.part.rows for group_pass in group_passes]).argsort()
        for layer_index, layer in enumerate(self.container.layers):
            names = list(cast(LayerSubmodules, layer).gates)
            early, late = [n for n in EARLY if n in names], [n for n in names if n not in EARLY]
            values: Tensors = {}
            for kind, kind_names in zip(GATES, (early, late), strict=True):
                group_values = [
                    group_pass.saved[layer_index][kind]
                    for group_pass in group_passes
                    if kind in group_pass.saved[layer_index]
                ]
                if group_values:
                    columns = torch.cat(group_values)[order].unbind(1)
                    values |= zip(kind_names, columns, strict=True)
            ordered = [name for name in names if name in early] + late
            yield {name: values[name] for name in ordered if name in values}

    def _kept(self, dtype: torch.dtype) -> list[Trained]:
        """Return the trained tensors ready for a pass; of a stored run they are made so once."""
        parameters = (
            (*run.trained.values(), *run.container.parameters_of_prefix()) for run in self.runs
        )
        state = (dtype, *map(state_of, chain.from_iterable(parameters)))
        if self.kept is None or self.kept[0] != state:
            names, tensors = zip(*self._tensors(), strict=True)
            made = self.ready(names, tensors, dtype)
            # An optimiser may write without a trace, so what trains is made ready every time.
            if not self.is_stored:
                return made
            self.kept = state, made
        return self.kept[1]

    def _tensors(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        """Yield the trained tensors of every layer under their names, with the run axis first."""
        for name in self.trained:
            yield name, stack([run.trained[name] for run in self.runs])
        prefixes = [run.container.prefix() for run in self.runs if run.container.prefix is not None]
        if prefixes:
            yield (-1, "prefix"), stack(prefixes)

    def _group_passes(self, hidden: Tensor, mask: Tensor) -> list[RowGroupPass]:
        length = self.container.state.prefix_length
        is_training = self.container.training
        drawn = [
            [
                None if d is None or not is_training else self.draws.next(len(mask))
                for d in layer.dropouts
            ]
            for layer in self.layers
        ]
        group_passes = []
        for rows, runs in share_out(mask, self.counts or [len(mask)]):
            part = row_group(mask, rows, runs, length, hidden.dtype)
            masks = None
            if torch.is_grad_enabled():
                own_rows = rows.cpu()
                taken = [[key and key.take(own_rows) for key in keys] for keys in drawn]
                layer_keys = zip(self.layers, taken, strict=True)
                masks = [Masks(part, layer.dropouts, keys) for layer, keys in layer_keys]
            group_passes.append(RowGroupPass(part, masks))
        return group_passes

    def ready(
        self, names: Sequence[tuple[int, str]], tensors: Sequence[Tensor], dtype: torch.dtype
    ) -> list[Trained]:
        """Make the trained tensors ready for a pass, by layer."""
        named_tensors = dict(zip(names, tensors, strict=True))
        prefix = named_tensors.pop((-1, "prefix"), None)
        by_layer: list[Tensors] = [{} for _ in self.layers]
        for (layer_index, name), tensor in named_tensors.items():
            by_layer[layer_index][name] = tensor
        return [
            make_ready(
                layer_tensors, None if prefix is None else prefix[:, layer_index], self.scale, dtype
            )
            for layer_index, layer_tensors in enumerate(by_layer)
        ]

    def run(
        self, hidden: Tensor, group_passes: list[RowGroupPass], trained: list[Trained]
    ) -> Tensor:
        """Send every part through all layers."""
        output = torch.zeros_like(hidden)

        def travel(group_pass: RowGroupPass) -> None:
            part = group_pass.part
            x = hidden.flatten(0, 1).index_select(0, part.source)
            group_trained = [layer.of(part.runs) for layer in trained]
            for layer_index, layer in enumerate(self.layers):
                masks = None if group_pass.masks is None else group_pass.masks[layer_index]
                x, saved = layer.forward(x, part, group_trained[layer_index], self.heads, masks)
                group_pass.saved.append(saved)
            output.flatten(0, 1).index_copy_(0, part.source, x)

        run_parts(travel, group_passes)
        return output

    def run_back(
        self,
        grad: Tensor,
        group_passes: list[RowGroupPass],
        trained: list[Trained],
        needs_input: bool,
    ) -> tuple[Tensor | None, list[Tensors]]:
        """Return the gradients of what `run` was given, the trained tensors' by layer."""
        first = torch.zeros_like(grad) if needs_input else None

        def travel(group_pass: RowGroupPass) -> list[Tensors]:
            part = group_pass.part
            grads: list[Tensors] = []
            x: Tensor | None = grad.flatten(0, 1).index_select(0, part.source)
            for layer_index in reversed(range(len(self.layers))):
                assert x is not None
                assert group_pass.masks is not None
                layer_trained = trained[layer_index].of(part.runs)
                masks = group_pass.masks[layer_index]
                needed = needs_input or layer_index > 0
                x, layer_grads = self.layers[layer_index].backward(
                    x, group_pass.saved.pop(), part, layer_trained, self.heads, masks, needed
                )
                grads.append(layer_grads)
            if first is not None and x is not None:
                first.flatten(0, 1).index_copy_(0, part.source, x)
            return grads[::-1]

        group_grads = run_parts(travel, group_passes)
        runs = [group_pass.part.runs for group_pass in group_passes]
        return first, [
            sum_by_run(grads_of_layer, runs) for grads_of_layer in zip(*group_grads, strict=True)
        ]


class _Encode(torch.autograd.Function):
    """All layers as one operation; the graph knows nothing of what is in it."""

    @staticmethod
    def forward(
        ctx: Any,
        stack: Stack,
        group_passes: list[RowGroupPass],
        names: Sequence[tuple[int, str]],
        hidden: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.stack, ctx.group_passes, ctx.names = stack, group_passes, names
        ctx.trained = stack.ready(names, tensors, hidden.dtype)
        return stack.run(hidden, group_passes, ctx.trained)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.group_passes is None:
            raise RuntimeError("the fused layers' backward pass runs once: it frees what it read")
        needs_input = ctx.needs_input_grad[3]
        first, grads_by_layer = ctx.stack.run_back(grad, ctx.group_passes, ctx.trained, needs_input)
        parted: dict[tuple[int, str], Tensor] = {}
        for layer_index, grads in enumerate(grads_by_layer):
            layer_names = {name for at, name in ctx.names if at == layer_index}
            parted |= {
                (layer_index, name): g
                for name, g in part_gradients(grads, layer_names, ctx.stack.scale).items()
            }
        if (-1, "prefix") in ctx.names:
            parted[-1, "prefix"] = torch.stack([grads["prefix"] for grads in grads_by_layer], 1)
        ctx.group_passes = ctx.trained = None
        return None, None, None, first, *(parted[name] for name in ctx.names)
