"""The tensors that travel through fused layers: groups of rows, what trains, dropout masks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unipelt_cli.backbones.dropout import Dropout, DropoutKeys, masked

ATEN: Any = torch.ops.aten
Tensors = dict[str, Tensor]
AFTER_SOFTMAX, AFTER_ATTENTION, AFTER_OUTPUT = range(3)
GATES = ("gates", "late_gates")  # what is kept of a pass without gradients: (n, E) and (n, 1)
EARLY = ("lora", "lora_query", "lora_value", "prefix")


@dataclass(frozen=True)
class RowGroup:
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
        tensors = {k: v[runs] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Trained(**tensors, closed=self.closed)


@dataclass
class Masks:
    """The dropout masks of one layer and part: after the softmax, and after each block."""

    part: RowGroup
    dropouts: Sequence[Dropout | None]
    keys: Sequence[DropoutKeys | None]
    made: dict[int, Tensor] = field(default_factory=dict)

    def put(self, dropout_index: int, x: Tensor) -> Tensor:
        """Drop numbers of x, (M, C) or (n, H, T, S), unscaled; the same ones at every call."""
        dropout, keys, part = self.dropouts[dropout_index], self.keys[dropout_index], self.part
        if dropout is None or keys is None:
            return x
        if dropout_index not in self.made:
            if x.ndim > 2:
                mask = dropout.mask(keys, x.shape, x.device)
            else:
                shape = (len(part.rows), part.tokens, x.shape[-1])
                mask = dropout.mask(keys, shape, x.device, part.grid).view(x.shape)
            self.made[dropout_index] = mask
        return masked(x, self.made[dropout_index])

    def scale(self, dropout_index: int) -> float:
        """Return what the numbers that are kept are multiplied by."""
        dropout = self.dropouts[dropout_index]
        return 1.0 if dropout is None or self.keys[dropout_index] is None else dropout.scale

    def back(self, dropout_index: int, grad: Tensor) -> Tensor:
        """Return the gradient of what was dropped from."""
        kept = self.put(dropout_index, grad)
        return kept if kept is grad else kept.mul_(self.scale(dropout_index))


def with_closed(trained: list[Trained], closed: Collection[tuple[int, str]]) -> list[Trained]:
    """Let some (layer, part) of the trained tensors rest."""
    if not closed:
        return trained
    return [
        replace(
            layer_trained, closed=frozenset(part for layer, part in closed if layer == layer_index)
        )
        for layer_index, layer_trained in enumerate(trained)
    ]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors along a new first axis, without a copy where there is one."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def make_ready(
    tensors: Tensors, prefix: Tensor | None, scale: float, dtype: torch.dtype
) -> Trained:
    """Join what reads the same input: see `Trained`."""
    ready = Trained(prefix=prefix)
    gates = [name for name in EARLY if f"gates.{name}.weight" in tensors]
    reads = [
        tensors[f"lora.{projection}.a"]
        for projection in ("query", "value")
        if f"lora.{projection}.a" in tensors
    ]
    if gates:
        early = torch.cat([tensors[f"gates.{name}.weight"] for name in gates], 1)
        early_bias = torch.cat([tensors[f"gates.{name}.bias"] for name in gates], 1)
        ready = replace(ready, early=early, early_bias=early_bias)
        reads.append(early)
    if reads:
        ready = replace(ready, reads=torch.cat(reads, 1).to(dtype))
    if "lora.query.b" in tensors:
        query, value = tensors["lora.query.b"], tensors["lora.value.b"]
        runs, hidden, rank = query.shape
        back = query.new_zeros(runs, 2 * rank, 3 * hidden, dtype=dtype)
        back[:, :rank, :hidden] = query.mT * scale
        back[:, rank:, 2 * hidden :] = value.mT * scale
        ready = replace(ready, back=back)
    if "adapter.up.weight" in tensors:
        late = [tensors["adapter.down.weight"]]
        if "gates.adapter.weight" in tensors:
            gate, bias = tensors["gates.adapter.weight"], tensors["gates.adapter.bias"]
            ready = replace(ready, late=gate, late_bias=bias)
            late.append(gate)
        ready = replace(
            ready,
            late_reads=torch.cat(late, 1).to(dtype),
            down_bias=tensors["adapter.down.bias"].to(dtype),
            up=tensors["adapter.up.weight"].to(dtype),
            up_bias=tensors["adapter.up.bias"].to(dtype),
        )
    return ready


def part_gradients(grads: Tensors, names: set[str], scale: float) -> Tensors:
    """Take gradients of joined tensors apart: the way back of `make_ready`."""
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
    for gate_index, name in enumerate(gates):
        parted[f"gates.{name}.weight"] = grads["reads"][:, at + gate_index : at + gate_index + 1]
        parted[f"gates.{name}.bias"] = grads["early_bias"][:, gate_index : gate_index + 1]
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


def sum_by_run(group_grads: Sequence[Tensors], runs: Sequence[slice]) -> Tensors:
    """Add up what the parts found for one layer, each for its runs."""
    total: Tensors = {}
    count = max(part.stop for part in runs)
    for grads, part in zip(group_grads, runs, strict=True):
        for name, grad in grads.items():
            if name not in total:
                total[name] = grad.new_zeros(count, *grad.shape[1:], dtype=torch.float32)
            total[name][part] += grad
    return total
