"""A frozen layer with its submodules, forward and backward, written out."""

from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.dropout import Dropout
from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.unipelt.fused.attention import attend, attend_back, rows_back
from unipelt_cli.methods.unipelt.fused.tensors import (
    AFTER_ATTENTION,
    AFTER_OUTPUT,
    ATEN,
    GATES,
    Masks,
    RowGroup,
    Tensors,
    Trained,
)

PACKED: Any = torch.ops.mkldnn


class FrozenLinear:
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
        self.qkv = FrozenLinear(weight, bias)
        self.attention_output, self.intermediate, self.output = (
            FrozenLinear(unit.weight.detach(), unit.bias.detach()) for unit in others
        )
        self.attention_norm = cast(nn.LayerNorm, layer.get_submodule(layout.attention_norm))
        self.output_norm = cast(nn.LayerNorm, layer.get_submodule(layout.output_norm))
        paths = (f"{layout.attention}.dropout", layout.attention_added, layout.output_added)
        modules = [layer.get_submodule(path) for path in paths]
        self.dropouts = [
            module if isinstance(module, Dropout) and module.threshold else None
            for module in modules
        ]
        taken = [p for unit in projections + others for p in (unit.weight, unit.bias)]
        self._taken = [(parameter, *state_of(parameter)) for parameter in taken]

    @property
    def is_current(self) -> bool:
        """Whether the backbone's tensors are still those that were taken."""
        return all(state_of(parameter) == tuple(state) for parameter, *state in self._taken)

    def forward(
        self, x: Tensor, part: RowGroup, trained: Trained, heads: int, masks: Masks | None
    ) -> tuple[Tensor, Tensors]:
        """Return the layer's output (M, D) and what `backward` needs; without masks its gates."""
        saved: Tensors = {"x": x}
        gates = None
        if trained.early is not None and trained.early_bias is not None:
            saved["opened"], gates = _pool(x, trained.early, trained.early_bias, part)
            saved["gates"] = gates
        qkv = self.qkv(x)
        if trained.reads is not None and trained.back is not None and "lora" not in trained.closed:
            low = part.by_run(x) @ trained.reads[:, : trained.back.shape[1]].mT
            saved |= {"low": low, "scaled": _by_place(low, part, trained, gates)}
            part.by_run(qkv).baddbmm_(saved["scaled"], trained.back)
        context = attend(qkv, part, trained, gates, heads, masks, saved)
        summed = _plus(x, self.attention_output(context), masks, AFTER_ATTENTION)
        h = _norm(self.attention_norm, summed, "attention", saved)
        if masks is None:
            inner = self.intermediate.gelu(h)
        else:
            saved["before"] = self.intermediate(h)
            inner = functional.gelu(saved["before"])
        summed = _plus(h, self.output(inner), masks, AFTER_OUTPUT)
        if trained.late_reads is not None and "adapter" not in trained.closed:
            summed = self._adapt(summed, part, trained, saved)
        output = _norm(self.output_norm, summed, "output", saved)
        return output, saved if masks else {name: saved[name] for name in GATES if name in saved}

    def _adapt(self, summed: Tensor, part: RowGroup, trained: Trained, saved: Tensors) -> Tensor:
        """Add the adapter's answer, as far as its gate is open, to what the last norm reads."""
        assert trained.late_reads is not None
        assert trained.down_bias is not None
        assert trained.up is not None
        assert trained.up_bias is not None
        read = _norm(self.output_norm, summed, "read", saved)
        bottleneck = trained.down_bias.shape[1]
        weight = trained.late_reads[:, :bottleneck].mT
        down = torch.baddbmm(trained.down_bias[:, None], part.by_run(read), weight).relu_()
        up = torch.baddbmm(trained.up_bias[:, None], down, trained.up.mT).view_as(summed)
        saved |= {"read": read, "down": down, "up": up}
        if trained.late is None or trained.late_bias is None:
            return summed + up
        saved["late_opened"], gate = _pool(read, trained.late, trained.late_bias, part)
        saved["late_gates"] = gate
        saved["late_gate"] = gate = gate.to(up.dtype)[part.row_of]  # (M, 1)
        return torch.addcmul(summed, up, gate)

    def backward(
        self,
        grad: Tensor,
        saved: Tensors,
        part: RowGroup,
        trained: Trained,
        heads: int,
        masks: Masks,
        needs_input: bool,
    ) -> tuple[Tensor | None, Tensors]:
        """Return the gradients of the layer's input, if it is needed, and of `trained`, by name."""
        grads: Tensors = {}
        grad = _norm_back(self.output_norm, grad, "output", saved)
        if trained.late_reads is not None:
            grad = self._adapt_back(grad, saved, part, trained, grads)
        inner = self.output.back(masks.back(AFTER_OUTPUT, grad))
        inner = ATEN.gelu_backward(inner, saved["before"])
        grad = grad + self.intermediate.back(inner)
        grad = _norm_back(self.attention_norm, grad, "attention", saved)
        context = self.attention_output.back(masks.back(AFTER_ATTENTION, grad))
        qkv, rows = attend_back(context, saved, part, heads, masks)
        reads, gate_grads = [], []
        if trained.back is not None:
            by_run = part.by_run(qkv)
            grads["back"] = saved["scaled"].mT @ by_run
            low = by_run @ trained.back.mT
            if trained.early is not None:
                gate_grads.append(_place_sums(low * saved["low"], part, trained))
            reads.append(_by_place(low, part, trained, saved.get("gates")))
        if trained.prefix is not None:
            grads["prefix"], gate_grad = rows_back(rows, trained.prefix, saved.get("gates"))
            gate_grads += [] if gate_grad is None else [gate_grad]
        if trained.early is not None:
            pooled = _pool_back(torch.cat(gate_grads, 1), saved["opened"], part)
            grads["early_bias"] = part.by_run(pooled).sum(1)
            reads.append(part.by_run(pooled).to(grad.dtype))
        if trained.reads is not None:
            # Of the gates too in the backbone's kind: products of their own in fp32 would take an
            # error of 1.48 % of their gradients in bf16 to 1.47 %, for 1 to 2 % of a step's time.
            low = torch.cat(reads, -1)
            grads["reads"] = low.mT @ part.by_run(saved["x"])
            if needs_input:
                grad = torch.baddbmm(part.by_run(grad), low, trained.reads).view_as(grad)
        return grad + self.qkv.back(qkv) if needs_input else None, grads

    def _adapt_back(
        self, grad: Tensor, saved: Tensors, part: RowGroup, trained: Trained, grads: Tensors
    ) -> Tensor:
        assert trained.late_reads is not None
        assert trained.up is not None
        is_gated = trained.late is not None
        up = part.by_run(grad * saved["late_gate"] if is_gated else grad)
        down = ATEN.threshold_backward(up @ trained.up, saved["down"], 0)
        grads |= {"up": up.mT @ saved["down"], "up_bias": up.sum(1), "down_bias": down.sum(1)}
        if is_gated:
            gate = part.summed((grad * saved["up"]).sum(1, keepdim=True, dtype=torch.float32))
            pooled = part.by_run(_pool_back(gate, saved["late_opened"], part))
            grads["late_bias"] = pooled.sum(1)
            down = torch.cat([down, pooled.to(down.dtype)], -1)
        grads["late_reads"] = down.mT @ part.by_run(saved["read"])
        read = (down @ trained.late_reads).view_as(grad)
        return grad + _norm_back(self.output_norm, read, "read", saved)


def _unit(layer: nn.Module, path: str) -> nn.Linear:
    return cast(nn.Linear, layer.get_submodule(path))


def state_of(parameter: Tensor) -> tuple[int, int]:
    """Return what changes when a parameter is written or replaced."""
    return parameter.data_ptr(), parameter._version


def _pool(x: Tensor, weight: Tensor, bias: Tensor, part: RowGroup) -> tuple[Tensor, Tensor]:
    """Return sigmoid(w.x + b) of every token (M, E), and its mean over real tokens (n, E)."""
    opened = torch.baddbmm(bias[:, None], part.by_run(x).float(), weight.mT).sigmoid_()
    opened = opened.view(len(x), -1)
    return opened, part.summed(opened * part.share)


def _pool_back(grad: Tensor, opened: Tensor, part: RowGroup) -> Tensor:
    """Return the gradient (M, E) of what the sigmoids read."""
    return grad[part.row_of] * part.share * opened * (1 - opened)


def _by_place(low: Tensor, part: RowGroup, trained: Trained, gates: Tensor | None) -> Tensor:
    """Multiply LoRA's (R, M / R, 2r) by the gate of query and that of value, if it has any."""
    if gates is None:
        return low
    used = gates if trained.prefix is None else gates[:, :-1]
    used = used.to(low.dtype)[part.row_of, :, None]
    return (low.view(len(used), 2, -1) * used).view_as(low)


def _place_sums(product: Tensor, part: RowGroup, trained: Trained) -> Tensor:
    """Return the gradients of LoRA's gates, (n, 1 or 2)."""
    assert trained.early is not None
    count = trained.early.shape[1] - (trained.prefix is not None)
    halves = product.view(-1, 2, product.shape[-1] // 2).sum(2, dtype=torch.float32)
    sums = part.summed(halves)
    return sums.sum(1, keepdim=True) if count == 1 else sums


def _plus(x: Tensor, added: Tensor, masks: Masks | None, dropout_index: int) -> Tensor:
    if masks is None:
        return x + added
    return torch.add(x, masks.put(dropout_index, added), alpha=masks.scale(dropout_index))


def _norm(norm: nn.LayerNorm, x: Tensor, name: str, saved: Tensors) -> Tensor:
    shape = norm.normalized_shape
    normed, mean, deviation = ATEN.native_layer_norm(x, shape, norm.weight, norm.bias, norm.eps)
    saved |= {f"{name}_input": x, f"{name}_mean": mean, f"{name}_deviation": deviation}
    return cast(Tensor, normed)


def _norm_back(norm: nn.LayerNorm, grad: Tensor, name: str, saved: Mapping[str, Tensor]) -> Tensor:
    x, mean, deviation = (saved[f"{name}_{kind}"] for kind in ("input", "mean", "deviation"))
    backward = ATEN.native_layer_norm_backward
    shape, wanted = norm.normalized_shape, (True, False, False)
    return cast(
        Tensor, backward(grad, x, shape, mean, deviation, norm.weight, norm.bias, wanted)[0]
    )
