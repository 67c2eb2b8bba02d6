"""Learned vectors that rescale keys, values and the feed-forward block's inner activations.

Liu et al. 2022 (arXiv 2205.05638). Every vector starts at 1, where nothing changes, to the bit.
"""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Gates,
    Method,
    Published,
    Recipe,
    refuse_unusual_layers,
)
from unipelt_cli.methods.forms import Rescalings


class LayerScales(nn.Module):
    """The three vectors of one layer; the last acts after the non-linearity."""

    def __init__(self, layer: nn.Module, layout: Layout) -> None:
        super().__init__()
        key, value, output = (
            layer.get_submodule(path) for path in (layout.key, layout.value, layout.output)
        )
        assert isinstance(key, nn.Linear)
        assert isinstance(value, nn.Linear)
        assert isinstance(output, nn.Linear)
        self.key = nn.Parameter(torch.ones(key.out_features))
        self.value = nn.Parameter(torch.ones(value.out_features))
        self.inner = nn.Parameter(torch.ones(output.in_features))
        self.handles = [
            key.register_forward_hook(self._scale_key),
            value.register_forward_hook(self._scale_value),
            output.register_forward_pre_hook(self._scale_inner),
        ]

    def _scale_key(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.key.to(output.dtype)

    def _scale_value(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.value.to(output.dtype)

    def _scale_inner(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0] * self.inner.to(args[0].dtype),)

    def merge_into(self, layer: nn.Module, layout: Layout) -> None:
        """Scale the weights themselves, and stop scaling what they compute."""
        for path, vector in ((layout.key, self.key), (layout.value, self.value)):
            linear = layer.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            linear.weight *= vector[:, None]
            if linear.bias is not None:
                linear.bias.mul_(vector)
        output = layer.get_submodule(layout.output)
        assert isinstance(output, nn.Linear)
        output.weight *= self.inner
        for handle in self.handles:
            handle.remove()


class Scales(nn.Module):
    """All vectors of a backbone: `backbone.scales`."""

    def __init__(self, backbone: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        layers = layout.layer_list(backbone)
        self.layers = nn.ModuleList(LayerScales(layer, layout) for layer in layers)


@dataclass(frozen=True, config=CHECKS)
class Rescaling(Method):
    """(IA)3: rescale keys, values and inner activations in every layer."""

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone.scales = Scales(backbone, site.layout)

    def decays(self, name: str) -> bool:
        return False  # decay would pull a scale towards 0, and nothing changes at 1

    def as_low_rank_or_rescaling(
        self, backbone: nn.Module, part: str | None = None, gates: Gates = ()
    ) -> Rescalings:
        """Return the vectors; of a part there can be no question."""
        if part is not None:
            super().as_low_rank_or_rescaling(backbone, part)
        scales = backbone.scales
        assert isinstance(scales, Scales)
        layout = scales.layout
        outputs, inputs = {}, {}
        for path, layer_scales in zip(layout.layer_paths(backbone), scales.layers, strict=True):
            assert isinstance(layer_scales, LayerScales)
            outputs[f"{path}.{layout.key}"] = layer_scales.key.detach()
            outputs[f"{path}.{layout.value}"] = layer_scales.value.detach()
            inputs[f"{path}.{layout.output}"] = layer_scales.inner.detach()
        return Rescalings(outputs, inputs)

    @property
    def unmergeable(self) -> None:
        return None

    def merge(self, backbone: nn.Module) -> None:
        """Scale the rows of key and value, and the columns that read inner activations."""
        super().merge(backbone)
        scales = backbone.scales
        assert isinstance(scales, Scales)
        with torch.no_grad():
            layers = scales.layout.layer_list(backbone)
            for layer, layer_scales in zip(layers, scales.layers, strict=True):
                assert isinstance(layer_scales, LayerScales)
                layer_scales.merge_into(layer, scales.layout)
        del backbone.scales


METHODS = MappingProxyType(
    {
        "ia3": Recipe(
            Rescaling(),
            1e-2,
            "additive",
            "vectors that rescale keys, values and inner activations",
            "Liu et al. 2022",
            published=Published(3e-3, optimizer="Adafactor"),
        ),
    }
)
