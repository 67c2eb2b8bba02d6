"""What describes a union of submodules: its hyperparameters, and what follows from them alone."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import CHECKS, Method, refuse_unusual_layers

Part = Literal["adapter", "prefix", "lora", "bias", "parallel"]


def _listed(value: Any) -> Any:
    """Take a list apart that was written as one word with commas."""
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


def _plain_scale(*, gated: bool) -> float:
    """Return what LoRA's product is multiplied by where nobody says it: the paper's scales."""
    return 1.0 if gated else 2.0


@dataclass(frozen=True, config=CHECKS)
class UnionSettings(Method):
    """The hyperparameters of a union of submodules, and what follows from them alone."""

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
    prefix_start: Annotated[
        Literal["normal", "uniform"],
        Field(description="prefix: its MLP starts N(0, 0.02), biases 0 (UniPELT), or as torch's"),
    ] = "normal"
    parallel_bottleneck: Annotated[
        int, Field(ge=1, description="parallel adapter: width of its bottleneck")
    ] = 16
    parallel_scale: Annotated[
        float, Field(gt=0, description="parallel adapter: factor on what it adds")
    ] = 2.0
    parallel_dropout: Annotated[
        float, Field(ge=0, le=0.9, description="parallel adapter: dropout in its bottleneck")
    ] = 0.0
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
    gate_rate: Annotated[
        float, Field(gt=0, description="gates: factor on the rate, where there are any")
    ] = 1.0
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
        for submodule in self.leave_out:
            part, _, layer = submodule.partition(".")
            if part not in self.parts or not (layer.isascii() and layer.isdigit()):
                yield (
                    f"leave_out = {list(self.leave_out)}: {submodule!r} is no part of a layer",
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
        pairs = (submodule.split(".") for submodule in self.leave_out)
        return frozenset((int(layer), part) for part, layer in pairs)

    @property
    def submodules(self) -> tuple[str, ...]:
        return self.parts

    @property
    def earlier(self) -> Mapping[str, Any]:
        return {"parallel_dropout": 0.0, "prefix_start": "normal", "gate_rate": 1.0}

    def unwritten(self, written: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.lora_scale is None:
            return {}
        return {"lora_scale": _plain_scale(gated=bool(written.get("gated", self.gated)))}

    @property
    def pads_to_max_length(self) -> bool:
        return self.gated and self.gate_pooling == "all"

    def rate(self, name: str) -> float:
        """Return the factor of the part that a tensor belongs to, or of gates."""
        _, holder, *rest = name.split(".")
        part = holder if holder == "prefix" else rest[1]
        if part in ("gates", "task_gates"):
            return self.gate_rate
        return cast(float, getattr(self, f"{part}_rate", 1.0))

    @property
    def lora_factor(self) -> float:
        """What LoRA's product is multiplied by, beside its gate if it has one."""
        if self.lora_scale is not None:
            return self.lora_scale
        return _plain_scale(gated=self.gated)

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
