"""AdapterFusion: attention, in every layer and token, over the adapters of several tasks.

Pfeiffer et al. 2021 (arXiv 2005.00247). Ours rather than the `adapters` library's, whose layers
change a temperature in every forward pass, evaluation included, and lack some architectures.
Shapes: batch B, tokens T, hidden D, adapters n.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.errors import ConfigError, RunError
from unipelt_cli.files import sealed
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Method,
    Published,
    Recipe,
    Stage,
    TrainingBatch,
    refuse_unusual_layers,
)
from unipelt_cli.methods.building_blocks import Adapter, apply_linear, new_linear

Tensors = Mapping[str, Tensor]


class FusionLayer(nn.Module):
    """One layer's adapters, those loaded and the task's own, and the attention over them."""

    def __init__(self, hidden: int, width: int, loaded: int, generator: Generator) -> None:
        super().__init__()
        self.fuses = False
        self.own = Adapter(hidden, width, generator)
        self.query = new_linear(hidden, hidden, generator)
        self.key = new_linear(hidden, hidden, generator)
        near_identity = torch.full((hidden, hidden), 1e-6).fill_diagonal_(1.0)
        self.value = nn.Parameter(near_identity)
        self.loaded = nn.ModuleList(Adapter(hidden, width, generator) for _ in range(loaded))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the residual (B, T, D), for the states x (B, T, D)."""
        trained: Tensor = self.own(x)
        if not self.fuses:
            return trained
        outputs = torch.stack([*(adapter(x) for adapter in self.loaded), trained], dim=2)
        query, keys = apply_linear(self.query, x), apply_linear(self.key, outputs)
        scores = (query[:, :, None] * keys).float().sum(-1)
        mixed = (scores.softmax(-1).to(x.dtype)[..., None] * outputs).sum(2)
        return functional.linear(mixed, self.value.to(x.dtype))

    def hook(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Stand before the layer's last norm; read the states that the norm makes of its input."""
        (summed,) = args
        return (summed + self(norm.forward(summed)),)

    def fusion(self) -> Iterator[nn.Parameter]:
        """Return what trains in the second stage."""
        yield from (*self.query.parameters(), *self.key.parameters(), self.value)

    def pull(self) -> Tensor:
        """Return the squared distance of W_V from the identity."""
        identity = torch.eye(len(self.value), device=self.value.device)
        return (self.value - identity).square().sum()


@dataclass(frozen=True, config=CHECKS)
class AdapterFusion(Method):
    """The adapters of finished runs and the task's own, mixed by attention.

    The task's adapter trains first, alone; then all adapters are frozen and the attention trains.
    The run keeps every adapter, so that it needs the other runs only while it trains. Unlike the
    library's, the attention's weights are not dropped out, and have no temperature.
    """

    adapters: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda runs: tuple(runs.split(",")) if isinstance(runs, str) else runs),
        Field(strict=False, description="directories of finished `adapter` runs, besides its own"),
    ] = ()
    reduction: Annotated[int, Field(ge=1, description="hidden size over bottleneck")] = 16
    identity: Annotated[
        float, Field(ge=0, description="weight of the pull of W_V to the identity")
    ] = 0.01
    fusion_rate: Annotated[
        float, Field(gt=0, description="the attention's learning rate, over the adapter's")
    ] = 0.2

    def problems(self) -> Iterator[tuple[str, str]]:
        if len(set(self.adapters)) < len(self.adapters):
            yield f"adapters = {list(self.adapters)}: a run is named twice", "name each run once"

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)

    @property
    def idle(self) -> Mapping[str, str]:
        alone = "one adapter alone gets all the attention, whatever query and key are"
        shift = "it adds the same to the scores of all adapters"
        return {
            r"fusion\.\d+\.key\.bias": shift,
            **({} if self.adapters else {r"fusion\.\d+\.(query|key)\..*": alone}),
        }

    @property
    def stages(self) -> tuple[Stage, ...]:
        return Stage(), Stage()

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        layers = site.layout.layer_list(backbone)
        query = layers[0].get_submodule(site.layout.query)
        assert isinstance(query, nn.Linear)
        hidden = query.in_features
        width = max(1, hidden // self.reduction)
        fused = [
            FusionLayer(hidden, width, len(self.adapters), site.generator).requires_grad_(False)
            for _ in layers
        ]
        if not (site.folded or query.weight.is_meta):
            for index, run in enumerate(self.adapters):
                read = _read(run, len(layers), (hidden, width), site.fingerprint)
                for fusion_layer, tensors in zip(fused, read, strict=True):
                    fusion_layer.loaded[index].load_state_dict(tensors)
        for layer, fusion_layer in zip(layers, fused, strict=True):
            norm = layer.get_submodule(site.layout.output_norm)
            norm.register_forward_pre_hook(fusion_layer.hook)
        backbone.fusion = nn.ModuleList(fused)
        self.enter_stage(backbone, 1 if site.folded else 0)

    def enter_stage(self, backbone: nn.Module, stage: int) -> None:
        """Train the task's own adapter alone, then the attention over all of them."""
        for layer in _layers(backbone):
            layer.fuses = stage == 1
            layer.own.requires_grad_(stage == 0)
            for parameter in layer.fusion():
                parameter.requires_grad_(stage == 1)

    def loss(self, step: TrainingBatch) -> Tensor:
        loss = super().loss(step)
        if step.moment.stage == 0:
            return loss
        pulls = [layer.pull() for layer in _layers(step.backbone)]
        return loss + self.identity * torch.stack(pulls).sum()

    def rate(self, name: str) -> float:
        is_fusion = name.startswith("fusion.") and ".own." not in name
        return self.fusion_rate if is_fusion else 1.0

    def decays(self, name: str) -> bool:
        return not name.endswith(".value")  # it is pulled to the identity instead

    def trainable(self, backbone: nn.Module) -> int:
        """Count both stages' numbers, and not the adapters of other runs."""
        stored = [name for name in self.fold(backbone) if ".loaded." not in name]
        parameters = backbone.named_parameters()
        return sum(p.numel() for n, p in parameters if p.requires_grad or n in stored)

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return the attention and every adapter, whichever trains now."""
        return {
            name: parameter.detach()
            for name, parameter in backbone.named_parameters()
            if name.startswith("fusion.")
        }


def _read(run: str, layers: int, sizes: tuple[int, int], fingerprint: str) -> list[Tensors]:
    """Return the adapters of a finished run, one a layer; raise ConfigError for any other run."""
    path = Path(run)
    setting = f"method.adapters = {run!r}"
    if not (path / "result.json").is_file():
        raise ConfigError(
            f"{setting}: no finished run", "name directories of finished `adapter` runs"
        )
    try:
        tensors, header = sealed.open_tensors(path / "model.safetensors")
        backbone = str(header["backbone"]["fingerprint"])
    except (RunError, KeyError, TypeError):
        raise ConfigError(f"{setting}: its model.safetensors is damaged", sealed.REMEDY) from None
    if backbone != fingerprint:
        raise ConfigError(
            f"{setting}: was trained on another backbone", "name runs on this run's backbone"
        )
    hidden, width = sizes
    shapes = {
        "down.weight": (width, hidden),
        "down.bias": (width,),
        "up.weight": (hidden, width),
        "up.bias": (hidden,),
    }
    wanted = {
        f"backbone.submodules.layers.{layer}.adapter.{name}": shape
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    adapters = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("backbone.")}
    if adapters.keys() != wanted.keys():
        raise ConfigError(
            f"{setting}: holds something other than one adapter a layer",
            "name runs of the method `adapter`",
        )
    if adapters != wanted:
        other = len(tensors["backbone.submodules.layers.0.adapter.down.bias"])
        raise ConfigError(
            f"{setting}: its bottlenecks have {other} units, this run's {width}",
            f"set method.reduction={hidden // other}, as that run had",
        )
    return [
        {name: tensors[f"backbone.submodules.layers.{layer}.adapter.{name}"] for name in shapes}
        for layer in range(layers)
    ]


def _layers(backbone: nn.Module) -> Iterator[FusionLayer]:
    assert isinstance(backbone.fusion, nn.ModuleList)
    for layer in backbone.fusion:
        assert isinstance(layer, FusionLayer)
        yield layer


METHODS = MappingProxyType(
    {
        "adapter-fusion": Recipe(
            AdapterFusion(),
            5e-4,
            "additive",
            "the adapters of finished runs and the task's own, mixed by attention",
            "Pfeiffer et al. 2021",
            published=Published(1e-4, method={"fusion_rate": 0.5}),
        ),
    }
)
