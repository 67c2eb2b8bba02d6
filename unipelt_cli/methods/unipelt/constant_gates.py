"""Unions whose gates are numbers, and unions that lack some of their submodules."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from unipelt_cli.methods.unipelt.method import Submodules


def with_constant_gates(
    method: Submodules, stored: Mapping[str, Tensor], gates: Sequence[Mapping[str, float]]
) -> tuple[Submodules, dict[str, Tensor]]:
    """Return the ungated union, and its stored tensors, that has these numbers for gates.

    `stored` is what `fold` gave; `gates` has a layer's each, by the names of `gate_names`.
    """
    kept = {}
    for name, tensor in stored.items():
        _, section, *rest = name.split(".")
        if section == "prefix":
            layers = [layer for layer in range(len(gates)) if "prefix" in gates[layer]]
            factors = tensor.new_tensor([gates[layer]["prefix"] for layer in layers])
            kept[name] = tensor * factors[:, None, None, None]
            continue
        layer, part, *path = rest
        if part in ("gates", "task_gates"):
            continue
        factor = _factor(gates[int(layer)], part, path)
        kept[name] = tensor if factor is None else tensor * factor
    ungated = replace(
        method,
        gated=False,
        lora_scale=method.lora_factor,
        gate_pooling="masked",
        lora_gates="shared",
        gate_bias=0.0,
    )
    return ungated, kept


def without(
    method: Submodules,
    stored: Mapping[str, Tensor],
    places: Collection[tuple[int, str]],
    layers: int,
) -> tuple[Submodules, dict[str, Tensor]]:
    """Return the union, and its stored tensors, that lacks some (layer, part) places too."""
    gone = method.left_out.union(places)
    whole = {part for part in method.parts if all((n, part) in gone for n in range(layers))}
    named = sorted((part, layer) for layer, part in gone if part not in whole)
    rows = [layer for layer in range(layers) if (layer, "prefix") not in method.left_out]
    kept = {}
    for name, tensor in stored.items():
        _, section, *rest = name.split(".")
        if section == "prefix":
            still = [row for row, layer in enumerate(rows) if (layer, "prefix") not in gone]
            if still:
                kept[name] = tensor[still]
            continue
        layer, part, *path = rest
        owner = path[-2].partition("_")[0] if part in ("gates", "task_gates") else part
        if (int(layer), owner) not in gone:
            kept[name] = tensor
    parts = tuple(part for part in method.parts if part not in whole)
    leave_out = tuple(f"{part}.{layer}" for part, layer in named)
    return replace(method, parts=parts, leave_out=leave_out), kept


def _factor(gates: Mapping[str, float], part: str, path: Sequence[str]) -> float | None:
    """Return the gate that multiplies a tensor of a layer; None where it multiplies another."""
    match part, path:
        case "lora", [projection, "b"]:
            return gates.get("lora", gates.get(f"lora_{projection}"))
        case "lora", _:
            return None
        case (("adapter" | "parallel"), ["down", _]):
            return None
    return gates[part]
