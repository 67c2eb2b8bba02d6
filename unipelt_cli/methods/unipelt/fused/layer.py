"""The layers of a frozen backbone with their submodules in few operations, forward and backward.

It computes what the hooks of `hooks.py` compute, for BERT's kind of layer with adapter, prefix and
LoRA, and takes their place where it can. Trained tensors have a leading run axis: several runs of
one method share each pass over the frozen weights. Padding exists in attention alone.
Shapes: real tokens M, rows n, runs R, tokens of the longest row T, hidden D, heads H, head size d,
prefix length P, keys S >= P + T, rank r, bottleneck m, early gates E.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.architectures import Layout
from unipelt_cli.backbones.dropout import Dropout, Keys, masked

ATEN: Any = torch.ops.aten
PACKED: Any = torch.ops.mkldnn
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """Some rows of a batch that go through all layers together, their tokens one after another."""

    rows: Tensor  # (n,) their places in the batch
    runs: slice  # the runs they belong to; each has as many of the tokens
    row_of: Tensor  # (M,) each token's row in the part
    grid: Tensor | None  # (M,) each token's place in n x T, None where it is its own
    source: Tensor  # (M,) each token's place in the batch's rows x tokens
    share: Tensor  # (M, 1) one over the number of real tokens of its row, 0 for padding
    tokens: int  # T
    bias: Tensor | None  # (n, 1, S) added to scores; None where every row reads every key
    keys: int  # S
    prefix: int  # P

    def by_run(self, x: Tensor) -> Tensor:
        """View (M, C) as (R, M / R, C)."""
        return x.view(self.runs.stop - self.runs.start, -1, x.shape[-1])

    def spread(self, x: Tensor) -> Tensor:
        """Put tokens (M, C) where they stand in their rows, (n, T, C), with zeros as padding."""
        n, width = len(self.rows), x.shape[-1]
        if self.grid is None:
            return x.view(n, self.tokens, width)
        spread = x.new_zeros(n * self.tokens, width).index_copy_(0, self.grid, x)
        return spread.view(n, self.tokens, width)

    def gathered(self, x: Tensor) -> Tensor:
        """Take the tokens (M, C) out of their rows: the way back of `spread`."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.grid is None else flat.index_select(0, self.grid)

    def summed(self, x: Tensor) -> Tensor:
        """Sum (M, C) over the tokens of each row: (n, C)."""
        if self.grid is None:
            return x.view(len(self.rows), self.tokens, -1).sum(1)
        return x.new_zeros(len(self.rows), x.shape[-1]).index_add_(0, self.row_of, x)


@dataclass(frozen=True)
class Trained:
    """A layer's submodules, each (R, ...), as one step's passes read them.

    What reads the same input is one matrix: LoRA's two A with the early gates, the adapter's down
    with its gate. Matrices are of the backbone's kind, gates float32.
    """

    reads: Tensor | None = None  # (R, 2r + E, D)
    back: Tensor | None = None  # (R, 2r, 3D): LoRA's B, scaled; zero beside query and value
    early: Tensor | None = None  # (R, E, D): LoRA's one or two, then the prefix's
    early_bias: Tensor | None = None  # (R, E)
    late_reads: Tensor | None = None  # (R, m + 1, D), or m where nothing is gated
    down_bias: Tensor | None = None  # (R, m)
    up: Tensor | None = None  # (R, D, m)
    up_bias: Tensor | None = None  # (R, D)
    late: Tensor | None = None  # (R, 1, D)
    late_bias: Tensor | None = None  # (R, 1)
    prefix: Tensor | None = None  # (R, 2, P, D) float32
    closed: frozenset[str] = frozenset()  # parts that rest in this pass, without gradients

    def of(self, runs: slice) -> "Trained":
        """Return what some runs have."""
        own = {k: v[runs] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Trained(**own, closed=self.closed)


@dataclass
class Masks:
    """The dropout masks of one layer and part: after the softmax, and after each block."""

    part: Part
    dropouts: Sequence[Dropout | None]
    keys: Sequence[Keys | None]
    made: dict[int, Tensor] = field(default_factory=dict)

    def put(self, place: int, x: Tensor) -> Tensor:
        """Drop numbers of x, (M, C) or (n, H, T, S), unscaled; the same ones at every call."""
        dropout, keys, part = self.dropouts[place], self.keys[place], self.part
        if dropout is None or keys is None:
            return x
        if place not in self.made:
            if x.ndim > 2:
                mask = dropout.mask(keys, x.shape, x.device)
            else:
                shape = (len(part.rows), part.tokens, x.shape[-1])
                mask = dropout.mask(keys, shape, x.device, part.grid).view(x.shape)
            self.made[place] = mask
        return masked(x, self.made[place])

    def scale(self, place: int) -> float:
        """Return what the numbers that are kept are multiplied by."""
        dropout = self.dropouts[place]
        return 1.0 if dropout is None or self.keys[place] is None else dropout.scale

    def back(self, place: int, grad: Tensor) -> Tensor:
        """Return the gradient of what was dropped from."""
        kept = self.put(place, grad)
        return kept if kept is grad else kept.mul_(self.scale(place))


AFTER_SOFTMAX, AFTER_ATTENTION, AFTER_OUTPUT = range(3)
GATES = ("gates", "late_gates")  # what is kept of a pass without gradients: (n, E) and (n, 1)


class Frozen:
    """A frozen linear unit; on a CPU its matrix lies as the products read it fastest."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.can_pack = weight.device.type == "cpu" and _packs(weight.dtype)

    @cached_property
    def ahead(self) -> Tensor:
        """The matrix for the way forward."""
        return cast(Tensor, PACKED._reorder_linear_weight(self.weight))

    @cached_property
    def behind(self) -> Tensor:
        """The matrix for the way back."""
        return cast(Tensor, PACKED._reorder_linear_weight(self.weight.t().contiguous()))

    def __call__(self, x: Tensor) -> Tensor:  # (M, inputs) -> (M, outputs)
        if not self.can_pack:
            return functional.linear(x, self.weight, self.bias)
        return cast(Tensor, PACKED._linear_pointwise(x, self.ahead, self.bias, "none", [], ""))

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the unit and a GELU, where what is between them is not needed."""
        if not self.can_pack:
            return functional.gelu(functional.linear(x, self.weight, self.bias))
        return cast(Tensor, PACKED._linear_pointwise(x, self.ahead, self.bias, "gelu", [], "none"))

    def back(self, grad: Tensor) -> Tensor:  # (M, outputs) -> (M, inputs)
        """Return the gradient of what the unit read."""
        if not self.can_pack:
            return grad @ self.weight
        return cast(Tensor, PACKED._linear_pointwise(grad, self.behind, None, "none", [], ""))


@lru_cache
def _packs(kind: torch.dtype) -> bool:
    """Whether this processor and this torch have products with packed matrices."""
    try:
        weight = PACKED._reorder_linear_weight(torch.zeros(32, 32, dtype=kind))
        PACKED._linear_pointwise(torch.zeros(2, 32, dtype=kind), weight, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


class FusedLayer:
    """One layer: its frozen tensors, as the fused operations read them."""

    def __init__(self, layer: nn.Module, layout: Layout) -> None:
        projections = [_unit(layer, path) for path in (layout.query, layout.key, layout.value)]
        others = [
            _unit(layer, path)
            for path in (layout.attention_output, layout.intermediate, layout.output)
        ]
        with torch.no_grad():
            weight = torch.cat([unit.weight for unit in projections])
            bias = torch.cat([unit.bias for unit in projections])
            thirds = zip(weight.chunk(3), bias.chunk(3), strict=True)
            for unit, (its_weight, its_bias) in zip(projections, thirds, strict=True):
                unit.weight.data, unit.bias.data = its_weight, its_bias  # not kept twice
        self.qkv = Frozen(weight, bias)
        self.attention_output, self.intermediate, self.output = (
            Frozen(unit.weight.detach(), unit.bias.detach()) for unit in others
        )
        self.attention_norm = cast(nn.LayerNorm, layer.get_submodule(layout.attention_norm))
        self.output_norm = cast(nn.LayerNorm, layer.get_submodule(layout.output_norm))
        paths = (f"{layout.attention}.dropout", layout.attention_added, layout.output_added)
        found = [layer.get_submodule(path) for path in paths]
        self.dropouts = [
            module if isinstance(module, Dropout) and module.threshold else None for module in found
        ]
        taken = [p for unit in projections + others for p in (unit.weight, unit.bias)]
        self._taken = [(parameter, *state_of(parameter)) for parameter in taken]

    @property
    def is_current(self) -> bool:
        """Whether the backbone's tensors are still those that were taken."""
        return all(state_of(parameter) == tuple(state) for parameter, *state in self._taken)

    def forward(
        self, x: Tensor, part: Part, own: Trained, heads: int, masks: Masks | None
    ) -> tuple[Tensor, Tensors]:
        """Return the layer's output (M, D) and what `backward` needs; without masks its gates."""
        saved: Tensors = {"x": x}
        gates = None
        if own.early is not None and own.early_bias is not None:
            saved["opened"], gates = _pool(x, own.early, own.early_bias, part)
            saved["gates"] = gates
        qkv = self.qkv(x)
        if own.reads is not None and own.back is not None and "lora" not in own.closed:
            low = part.by_run(x) @ own.reads[:, : own.back.shape[1]].mT
            saved |= {"low": low, "scaled": _by_place(low, part, own, gates)}
            part.by_run(qkv).baddbmm_(saved["scaled"], own.back)
        context = _attend(qkv, part, own, gates, heads, masks, saved)
        summed = _plus(x, self.attention_output(context), masks, AFTER_ATTENTION)
        h = _norm(self.attention_norm, summed, "attention", saved)
        if masks is None:
            inner = self.intermediate.gelu(h)
        else:
            saved["before"] = self.intermediate(h)
            inner = functional.gelu(saved["before"])
        summed = _plus(h, self.output(inner), masks, AFTER_OUTPUT)
        if own.late_reads is not None and "adapter" not in own.closed:
            summed = self._adapt(summed, part, own, saved)
        output = _norm(self.output_norm, summed, "output", saved)
        return output, saved if masks else {name: saved[name] for name in GATES if name in saved}

    def _adapt(self, summed: Tensor, part: Part, own: Trained, saved: Tensors) -> Tensor:
        """Add the adapter's answer, as far as its gate is open, to what the last norm reads."""
        assert own.late_reads is not None
        assert own.down_bias is not None
        assert own.up is not None
        assert own.up_bias is not None
        read = _norm(self.output_norm, summed, "read", saved)
        bottleneck = own.down_bias.shape[1]
        weight = own.late_reads[:, :bottleneck].mT
        down = torch.baddbmm(own.down_bias[:, None], part.by_run(read), weight).relu_()
        up = torch.baddbmm(own.up_bias[:, None], down, own.up.mT).view_as(summed)
        saved |= {"read": read, "down": down, "up": up}
        if own.late is None or own.late_bias is None:
            return summed + up
        saved["late_opened"], gate = _pool(read, own.late, own.late_bias, part)
        saved["late_gates"] = gate
        saved["late_gate"] = gate = gate.to(up.dtype)[part.row_of]  # (M, 1)
        return torch.addcmul(summed, up, gate)

    def backward(
        self,
        grad: Tensor,
        saved: Tensors,
        part: Part,
        own: Trained,
        heads: int,
        masks: Masks,
        needs_input: bool,
    ) -> tuple[Tensor | None, Tensors]:
        """Return the gradients of the layer's input, if it is needed, and of `own`, by name."""
        grads: Tensors = {}
        grad = _norm_back(self.output_norm, grad, "output", saved)
        if own.late_reads is not None:
            grad = self._adapt_back(grad, saved, part, own, grads)
        inner = self.output.back(masks.back(AFTER_OUTPUT, grad))
        inner = ATEN.gelu_backward(inner, saved["before"])
        grad = grad + self.intermediate.back(inner)
        grad = _norm_back(self.attention_norm, grad, "attention", saved)
        context = self.attention_output.back(masks.back(AFTER_ATTENTION, grad))
        qkv, rows = _attend_back(context, saved, part, heads, masks)
        reads, gate_grads = [], []
        if own.back is not None:
            by_run = part.by_run(qkv)
            grads["back"] = saved["scaled"].mT @ by_run
            low = by_run @ own.back.mT
            if own.early is not None:
                gate_grads.append(_place_sums(low * saved["low"], part, own))
            reads.append(_by_place(low, part, own, saved.get("gates")))
        if own.prefix is not None:
            grads["prefix"], gate_grad = _rows_back(rows, own.prefix, saved.get("gates"))
            gate_grads += [] if gate_grad is None else [gate_grad]
        if own.early is not None:
            pooled = _pool_back(torch.cat(gate_grads, 1), saved["opened"], part)
            grads["early_bias"] = part.by_run(pooled).sum(1)
            reads.append(part.by_run(pooled).to(grad.dtype))
        if own.reads is not None:
            low = torch.cat(reads, -1)
            grads["reads"] = low.mT @ part.by_run(saved["x"])
            if needs_input:
                grad = torch.baddbmm(part.by_run(grad), low, own.reads).view_as(grad)
        return grad + self.qkv.back(qkv) if needs_input else None, grads

    def _adapt_back(
        self, grad: Tensor, saved: Tensors, part: Part, own: Trained, grads: Tensors
    ) -> Tensor:
        assert own.late_reads is not None
        assert own.up is not None
        is_gated = own.late is not None
        up = part.by_run(grad * saved["late_gate"] if is_gated else grad)
        down = ATEN.threshold_backward(up @ own.up, saved["down"], 0)
        grads |= {"up": up.mT @ saved["down"], "up_bias": up.sum(1), "down_bias": down.sum(1)}
        if is_gated:
            gate = part.summed((grad * saved["up"]).sum(1, keepdim=True, dtype=torch.float32))
            pooled = part.by_run(_pool_back(gate, saved["late_opened"], part))
            grads["late_bias"] = pooled.sum(1)
            down = torch.cat([down, pooled.to(down.dtype)], -1)
        grads["late_reads"] = down.mT @ part.by_run(saved["read"])
        read = (down @ own.late_reads).view_as(grad)
        return grad + _norm_back(self.output_norm, read, "read", saved)


def _unit(layer: nn.Module, path: str) -> nn.Linear:
    return cast(nn.Linear, layer.get_submodule(path))


def state_of(parameter: Tensor) -> tuple[int, int]:
    """Return what changes when a parameter is written or replaced."""
    return parameter.data_ptr(), parameter._version


def _attend(
    qkv: Tensor,
    part: Part,
    own: Trained,
    gates: Tensor | None,
    heads: int,
    masks: Masks | None,
    saved: Tensors,
) -> Tensor:
    """Attend over prefix and tokens: (M, 3D) -> (M, D)."""
    n, tokens = len(part.rows), part.tokens
    query, *stored = (
        part.spread(qkv).view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    )  # (n, H, T, d) each
    size = query.shape[-1]
    both = qkv.new_zeros(2, n, heads, part.keys, size)
    for place, projected in enumerate(stored):
        both[place, :, :, part.prefix : part.prefix + tokens] = projected
    has_prefix = own.prefix is not None and "prefix" not in own.closed
    if own.prefix is not None and has_prefix:
        both[:, :, :, : part.prefix] = _rows(own.prefix, n, heads, gates)
    query = torch.mul(query, size**-0.5, out=qkv.new_empty(n, heads, tokens, size)).flatten(0, 1)
    keys, values = both.flatten(1, 2)
    scores = query @ keys.mT
    if part.bias is not None:
        scores.view(n, heads, tokens, -1).add_(part.bias[:, None])
    if part.prefix and not has_prefix:
        scores[..., : part.prefix] = torch.finfo(scores.dtype).min
    weights = used = scores.softmax(-1)
    if masks is not None:
        used = masks.put(AFTER_SOFTMAX, weights.view(n, heads, tokens, -1)).view_as(weights)
        saved |= {"query": query, "keys": keys, "values": values, "weights": weights, "used": used}
    context = used @ values
    if masks is not None:
        context *= masks.scale(AFTER_SOFTMAX)
    mixed: Tensor = context.view(n, heads, tokens, size).transpose(1, 2)
    return part.gathered(mixed.reshape(n, tokens, -1))


def _attend_back(
    grad: Tensor, saved: Tensors, part: Part, heads: int, masks: Masks
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the projected tokens (M, 3D) and of the prefix (2, n, H, P, d)."""
    n, tokens, hidden = len(part.rows), part.tokens, grad.shape[-1]
    size = hidden // heads
    by_head = part.spread(grad).view(n, tokens, heads, size).transpose(1, 2)
    scaled = by_head.reshape(n * heads, tokens, size) * masks.scale(AFTER_SOFTMAX)
    weights = saved["weights"]
    dropped = (scaled @ saved["values"].mT).view(n, heads, tokens, part.keys)
    dropped = masks.put(AFTER_SOFTMAX, dropped).view_as(weights)
    scores = ATEN._softmax_backward_data(dropped, weights, -1, weights.dtype)
    query = (scores @ saved["keys"]).mul_(size**-0.5)
    stored = scores.mT @ saved["query"], saved["used"].mT @ scaled  # of keys, of values
    keys, values = (one.view(n, heads, part.keys, size) for one in stored)
    first, last = part.prefix, part.prefix + tokens
    qkv = grad.new_empty(n, tokens, 3, heads, size)
    qkv[:, :, 0] = query.view(n, heads, tokens, size).transpose(1, 2)
    qkv[:, :, 1] = keys[:, :, first:last].transpose(1, 2)
    qkv[:, :, 2] = values[:, :, first:last].transpose(1, 2)
    rows = torch.stack([keys[:, :, :first], values[:, :, :first]])
    return part.gathered(qkv.view(n, tokens, 3 * hidden)), rows


def _rows(prefix: Tensor, n: int, heads: int, gates: Tensor | None) -> Tensor:
    """Return the prefix (R, 2, P, D) as every row has it: (2, n, H, P, d)."""
    runs, _, length, hidden = prefix.shape
    rows = prefix.view(runs, 1, 2, length, heads, hidden // heads)
    if gates is None:
        rows = rows.expand(-1, n // runs, -1, -1, -1, -1)
    else:
        rows = rows * gates[:, -1].view(runs, -1, 1, 1, 1, 1)
    return rows.reshape(n, 2, length, heads, -1).permute(1, 0, 3, 2, 4)


def _rows_back(grad: Tensor, prefix: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the prefix (R, 2, P, D) and of its gate (n, 1)."""
    runs = len(prefix)
    by_run = grad.permute(1, 0, 3, 2, 4).float().reshape(runs, grad.shape[1] // runs, -1)
    if gates is None:
        return by_run.sum(1).view_as(prefix), None
    gate = gates[:, -1].view(runs, 1, -1)
    flat = prefix.reshape(runs, -1, 1)
    return (gate @ by_run).view_as(prefix), (by_run @ flat).view(-1, 1)


def _pool(x: Tensor, weight: Tensor, bias: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Return sigmoid(w.x + b) of every token (M, E), and its mean over real tokens (n, E)."""
    opened = torch.baddbmm(bias[:, None], part.by_run(x).float(), weight.mT).sigmoid_()
    opened = opened.view(len(x), -1)
    return opened, part.summed(opened * part.share)


def _pool_back(grad: Tensor, opened: Tensor, part: Part) -> Tensor:
    """Return the gradient (M, E) of what the sigmoids read."""
    return grad[part.row_of] * part.share * opened * (1 - opened)


def _by_place(low: Tensor, part: Part, own: Trained, gates: Tensor | None) -> Tensor:
    """Multiply LoRA's (R, M / R, 2r) by the gate of query and that of value, if it has any."""
    if gates is None:
        return low
    used = gates if own.prefix is None else gates[:, :-1]
    used = used.to(low.dtype)[part.row_of, :, None]
    return (low.view(len(used), 2, -1) * used).view_as(low)


def _place_sums(product: Tensor, part: Part, own: Trained) -> Tensor:
    """Return the gradients of LoRA's gates, (n, 1 or 2)."""
    assert own.early is not None
    count = own.early.shape[1] - (own.prefix is not None)
    halves = product.view(-1, 2, product.shape[-1] // 2).sum(2, dtype=torch.float32)
    sums = part.summed(halves)
    return sums.sum(1, keepdim=True) if count == 1 else sums


def _plus(x: Tensor, added: Tensor, masks: Masks | None, place: int) -> Tensor:
    if masks is None:
        return x + added
    return torch.add(x, masks.put(place, added), alpha=masks.scale(place))


def _norm(norm: nn.LayerNorm, x: Tensor, name: str, saved: Tensors) -> Tensor:
    shape = norm.normalized_shape
    normed, mean, deviation = ATEN.native_layer_norm(x, shape, norm.weight, norm.bias, norm.eps)
    saved |= {f"{name}_input": x, f"{name}_mean": mean, f"{name}_deviation": deviation}
    return cast(Tensor, normed)


def _norm_back(norm: nn.LayerNorm, grad: Tensor, name: str, saved: Mapping[str, Tensor]) -> Tensor:
    x, mean, deviation = (saved[f"{name}_{kind}"] for kind in ("input", "mean", "deviation"))
    wanted = (True, False, False)
    given = (x, norm.normalized_shape, mean, deviation, norm.weight, norm.bias, wanted)
    return cast(Tensor, ATEN.native_layer_norm_backward(grad, *given)[0])
