"""The fused layers of one backbone in the place of the library's own, one pass for all runs.

The library still embeds the tokens and pools the answer; its first layer runs the whole stack and
the others hand on what they are given. Where a pass is not one that the fused layers can compute
exactly, the library's layers and the hooks do it.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unipelt_cli.backbones.dropout import Draws
from unipelt_cli.methods.unipelt.fused.layer import (
    GATES,
    FusedLayer,
    Masks,
    Part,
    Tensors,
    Trained,
    state_of,
)
from unipelt_cli.methods.unipelt.layer import Container, LayerSubmodules
from unipelt_cli.system.row_threads import lanes, run_parts, shares_out

PARTS = frozenset({"adapter", "prefix", "lora"})
WATCHED = ("output_attentions", "output_hidden_states")  # what only the library's layers give
EARLY = ("lora", "lora_query", "lora_value", "prefix")
LEAST_TOKENS = 96  # fewer are not worth a lane of their own
MOST_TOKENS = 512  # of more, what a layer works on does not fit a core's own cache


@dataclass
class Travel:
    """One part's way through the layers: what `backward` needs of it."""

    part: Part
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
            (place, name): parameter
            for place, layer in enumerate(container.layers)
            for name, parameter in layer.named_parameters()
        }
        self.heads = int(backbone.config.num_attention_heads)
        self.scale, self.is_stored = scale, is_stored
        self.kept: tuple[tuple[object, ...], list[Trained]] | None = None
        self.mask: Tensor | None = None  # of the pass that the stack computes, else None
        found = (dropout.draws for layer in self.layers for dropout in layer.dropouts if dropout)
        self.draws = next(found, Draws())  # this run's, whoever lends the layers
        for place, (_, layer) in enumerate(container.sites):
            layer.forward = partial(self._forward, place, layer.forward)

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
        self, place: int, original: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self.mask is None:
            return original(hidden, *args, **kwargs)
        mask = self.mask
        if place in (0, len(self.layers) - 1):
            self.mask = None  # a pass that fails, or the next one, is not ours
        if place == 0:
            hidden = self._encode(hidden, mask)
            self.mask = mask if len(self.layers) > 1 else None
        return (hidden,)

    def _encode(self, hidden: Tensor, mask: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        travels = self._travels(hidden, mask)
        state = self.container.state
        if not torch.is_grad_enabled():
            output = self.run(hidden, travels, _closing(self._kept(hidden.dtype), state.closed))
            if state.recorded is not None:
                state.recorded[:] = self._gates(travels)
            return output
        self.kept = None
        names, tensors = zip(*self._tensors(), strict=True)
        encode: Any = _Encode.apply
        return cast(Tensor, encode(self, travels, names, hidden, *tensors))

    def _gates(self, travels: Sequence[Travel]) -> Iterator[Tensors]:
        """Yield the gates of a pass as the hooks record them: by layer, each (N,)."""
        order = torch.cat([one.part.rows for one in travels]).argsort()
        for place, layer in enumerate(self.container.layers):
            names = list(cast(LayerSubmodules, layer).gates)
            early, late = [n for n in EARLY if n in names], [n for n in names if n not in EARLY]
            values: Tensors = {}
            for kind, own in zip(GATES, (early, late), strict=True):
                found = [one.saved[place][kind] for one in travels if kind in one.saved[place]]
                if found:
                    values |= dict(zip(own, torch.cat(found)[order].unbind(1), strict=True))
            ordered = [name for name in names if name in early] + late
            yield {name: values[name] for name in ordered if name in values}

    def _kept(self, dtype: torch.dtype) -> list[Trained]:
        """Return the trained tensors ready for a pass; of a stored run they are made so once."""
        own = ((*run.trained.values(), *run.container.parameters_of_prefix()) for run in self.runs)
        state = (dtype, *map(state_of, chain.from_iterable(own)))
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
            yield name, _stacked([run.trained[name] for run in self.runs])
        prefixes = [run.container.prefix() for run in self.runs if run.container.prefix is not None]
        if prefixes:
            yield (-1, "prefix"), _stacked(prefixes)

    def _travels(self, hidden: Tensor, mask: Tensor) -> list[Travel]:
        length = self.container.state.prefix_length
        is_training = self.container.training
        drawn = [
            [
                None if d is None or not is_training else self.draws.next(len(mask))
                for d in layer.dropouts
            ]
            for layer in self.layers
        ]
        travels = []
        for rows, runs in _parts(mask, self.counts or [len(mask)]):
            part = _part(mask, rows, runs, length, hidden.dtype)
            masks = None
            if torch.is_grad_enabled():
                own_rows = rows.cpu()
                taken = [[key and key.take(own_rows) for key in keys] for keys in drawn]
                own = zip(self.layers, taken, strict=True)
                masks = [Masks(part, layer.dropouts, keys) for layer, keys in own]
            travels.append(Travel(part, masks))
        return travels

    def ready(
        self, names: Sequence[tuple[int, str]], tensors: Sequence[Tensor], dtype: torch.dtype
    ) -> list[Trained]:
        """Make the trained tensors ready for a pass, by layer."""
        given = dict(zip(names, tensors, strict=True))
        prefix = given.pop((-1, "prefix"), None)
        by_layer: list[Tensors] = [{} for _ in self.layers]
        for (place, name), tensor in given.items():
            by_layer[place][name] = tensor
        return [
            _ready(own, None if prefix is None else prefix[:, place], self.scale, dtype)
            for place, own in enumerate(by_layer)
        ]

    def run(self, hidden: Tensor, travels: list[Travel], trained: list[Trained]) -> Tensor:
        """Send every part through all layers."""
        output = torch.zeros_like(hidden)

        def travel(one: Travel) -> None:
            part = one.part
            x = hidden.flatten(0, 1).index_select(0, part.source)
            own = [layer.of(part.runs) for layer in trained]
            for place, layer in enumerate(self.layers):
                masks = None if one.masks is None else one.masks[place]
                x, saved = layer.forward(x, part, own[place], self.heads, masks)
                one.saved.append(saved)
            output.flatten(0, 1).index_copy_(0, part.source, x)

        run_parts(travel, travels)
        return output

    def run_back(
        self, grad: Tensor, travels: list[Travel], trained: list[Trained], needs_input: bool
    ) -> tuple[Tensor | None, list[Tensors]]:
        """Return the gradients of what `run` was given, the trained tensors' by layer."""
        first = torch.zeros_like(grad) if needs_input else None

        def travel(one: Travel) -> list[Tensors]:
            part = one.part
            grads: list[Tensors] = []
            x: Tensor | None = grad.flatten(0, 1).index_select(0, part.source)
            for place in reversed(range(len(self.layers))):
                assert x is not None
                assert one.masks is not None
                own, masks = trained[place].of(part.runs), one.masks[place]
                needed = needs_input or place > 0
                x, found = self.layers[place].backward(
                    x, one.saved.pop(), part, own, self.heads, masks, needed
                )
                grads.append(found)
            if first is not None and x is not None:
                first.flatten(0, 1).index_copy_(0, part.source, x)
            return grads[::-1]

        found = run_parts(travel, travels)
        runs = [one.part.runs for one in travels]
        return first, [_summed(own, runs) for own in zip(*found, strict=True)]


class _Encode(torch.autograd.Function):
    """All layers as one operation; the graph knows nothing of what is in it."""

    @staticmethod
    def forward(
        ctx: Any,
        stack: Stack,
        travels: list[Travel],
        names: Sequence[tuple[int, str]],
        hidden: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.stack, ctx.travels, ctx.names = stack, travels, names
        ctx.trained = stack.ready(names, tensors, hidden.dtype)
        return stack.run(hidden, travels, ctx.trained)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.travels is None:
            raise RuntimeError("the fused layers' backward pass runs once: it frees what it read")
        needs_input = ctx.needs_input_grad[3]
        first, found = ctx.stack.run_back(grad, ctx.travels, ctx.trained, needs_input)
        parted: dict[tuple[int, str], Tensor] = {}
        for place, grads in enumerate(found):
            own = {name for at, name in ctx.names if at == place}
            parted |= {(place, name): g for name, g in _parted(grads, own, ctx.stack.scale).items()}
        if (-1, "prefix") in ctx.names:
            parted[-1, "prefix"] = torch.stack([grads["prefix"] for grads in found], 1)
        ctx.travels = ctx.trained = None
        return None, None, None, first, *(parted[name] for name in ctx.names)


def _closing(trained: list[Trained], closed: Collection[tuple[int, str]]) -> list[Trained]:
    """Let some (layer, part) of the trained tensors rest."""
    if not closed:
        return trained
    return [
        replace(own, closed=frozenset(part for layer, part in closed if layer == place))
        for place, own in enumerate(trained)
    ]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _ready(own: Tensors, prefix: Tensor | None, scale: float, dtype: torch.dtype) -> Trained:
    """Join what reads the same input: see `Trained`."""
    made: dict[str, Any] = {"prefix": prefix}
    gates = [name for name in EARLY if f"gates.{name}.weight" in own]
    reads = [own[f"lora.{place}.a"] for place in ("query", "value") if f"lora.{place}.a" in own]
    if gates:
        early = torch.cat([own[f"gates.{name}.weight"] for name in gates], 1)
        made["early_bias"] = torch.cat([own[f"gates.{name}.bias"] for name in gates], 1)
        made["early"] = early
        reads.append(early)
    if reads:
        made["reads"] = torch.cat(reads, 1).to(dtype)
    if "lora.query.b" in own:
        query, value = own["lora.query.b"], own["lora.value.b"]
        runs, hidden, rank = query.shape
        made["back"] = back = query.new_zeros(runs, 2 * rank, 3 * hidden, dtype=dtype)
        back[:, :rank, :hidden] = query.mT * scale
        back[:, rank:, 2 * hidden :] = value.mT * scale
    if "adapter.up.weight" in own:
        late = [own["adapter.down.weight"]]
        if "gates.adapter.weight" in own:
            made["late"], made["late_bias"] = own["gates.adapter.weight"], own["gates.adapter.bias"]
            late.append(own["gates.adapter.weight"])
        made["late_reads"] = torch.cat(late, 1).to(dtype)
        made["down_bias"] = own["adapter.down.bias"].to(dtype)
        made["up"] = own["adapter.up.weight"].to(dtype)
        made["up_bias"] = own["adapter.up.bias"].to(dtype)
    return Trained(**made)


def _parted(grads: Tensors, names: set[str], scale: float) -> Tensors:
    """Take gradients of joined tensors apart: the way back of `_ready`."""
    parted: Tensors = {}
    gates = [name for name in EARLY if f"gates.{name}.weight" in names]
    at = 0
    if "back" in grads:
        rank, hidden = grads["back"].shape[1] // 2, grads["back"].shape[2] // 3
        parted["lora.query.a"] = grads["reads"][:, :rank]
        parted["lora.value.a"] = grads["reads"][:, rank : 2 * rank]
        parted["lora.query.b"] = grads["back"][:, :rank, :hidden].mT.float() * scale
        parted["lora.value.b"] = grads["back"][:, rank:, 2 * hidden :].mT.float() * scale
        at = 2 * rank
    for place, name in enumerate(gates):
        parted[f"gates.{name}.weight"] = grads["reads"][:, at + place : at + place + 1]
        parted[f"gates.{name}.bias"] = grads["early_bias"][:, place : place + 1]
    if "up" in grads:
        bottleneck = grads["down_bias"].shape[1]
        parted["adapter.down.weight"] = grads["late_reads"][:, :bottleneck]
        parted["adapter.down.bias"] = grads["down_bias"]
        parted["adapter.up.weight"] = grads["up"]
        parted["adapter.up.bias"] = grads["up_bias"]
    if "late_bias" in grads:
        parted["gates.adapter.weight"] = grads["late_reads"][:, bottleneck:]
        parted["gates.adapter.bias"] = grads["late_bias"]
    return {name: grad.float() for name, grad in parted.items()}


def _summed(found: Sequence[Tensors], runs: Sequence[slice]) -> Tensors:
    """Add up what the parts found for one layer, each for its runs."""
    total: Tensors = {}
    count = max(part.stop for part in runs)
    for own, part in zip(found, runs, strict=True):
        for name, grad in own.items():
            if name not in total:
                total[name] = grad.new_zeros(count, *grad.shape[1:], dtype=torch.float32)
            total[name][part] += grad
    return total


def _parts(mask: Tensor, counts: Sequence[int]) -> list[tuple[Tensor, slice]]:
    """Share rows out: (places of rows, runs). On a CPU each part is of one run, of like lengths."""
    runs = len(counts)
    if not shares_out(mask.device):
        return [(torch.arange(len(mask), device=mask.device), slice(0, runs))]
    lengths, start, parts = mask.sum(1), 0, []
    for run, count in enumerate(counts):
        rows = start + lengths[start : start + count].argsort(descending=True, stable=True)
        pieces = min(_pieces(int(lengths[rows].sum()), runs), count)
        for piece in range(pieces):  # of as many rows, and nearly as many tokens, each
            parts.append((rows[piece::pieces], slice(run, run + 1)))
        start += count
    return parts


def _pieces(tokens: int, runs: int) -> int:
    """Into how many parts a run's rows go, so that every lane gets as many."""
    multiple = lanes() // math.gcd(lanes(), runs)
    pieces = -(-max(1, tokens // MOST_TOKENS) // multiple) * multiple
    return min(pieces, max(1, tokens // LEAST_TOKENS))


def _part(mask: Tensor, rows: Tensor, runs: slice, prefix: int, dtype: torch.dtype) -> Part:
    """Describe a part of a batch with this mask (N, T): where its tokens are, what they read."""
    own = mask[rows]
    lengths, width = own.sum(1), mask.shape[1]
    tokens = _rounded(int(lengths.max()), 8)
    keys = _rounded(prefix + tokens, 32 if dtype.itemsize == 2 else 16)
    spread = own.new_zeros(len(own), max(tokens, width))
    spread[:, :width] = own
    spread = spread[:, :tokens]
    bias = None
    if keys > prefix + tokens or not bool(spread.all()):
        closed = torch.finfo(dtype).min
        bias = torch.zeros(len(own), 1, keys, dtype=dtype, device=mask.device)
        bias[:, 0, prefix : prefix + tokens] = (1 - spread).to(dtype) * closed
        bias[:, 0, prefix + tokens :] = closed
    grid = _travellers(spread, width)
    row_of, position = grid // tokens, grid % tokens
    source = rows[row_of] * width + position
    share = (own[row_of, position] / lengths[row_of])[:, None].float()
    kept = None if len(grid) == spread.numel() else grid
    return Part(rows, runs, row_of, kept, source, share, tokens, bias, keys, prefix)


def _rounded(count: int, step: int) -> int:
    """Round up, so that few shapes exist: a processor's products are prepared for each anew."""
    return -(-count // step) * step


def _travellers(spread: Tensor, width: int) -> Tensor:
    """Return the places of the tokens that go through the layers; spread: (n, T), 1 for real ones.

    Some padding goes along to round their number; not on a CPU all of it, so that runs are alike.
    """
    flat = spread[:, :width].flatten()
    places = torch.arange(spread.numel(), device=spread.device).view_as(spread)
    places = places[:, :width].flatten()
    if not shares_out(spread.device):
        return places
    real = int(flat.sum())
    count = min(_rounded(real, 32 if real > 256 else 16), len(flat))
    chosen = flat.argsort(descending=True, stable=True)[:count]
    return places[chosen.sort().values]
