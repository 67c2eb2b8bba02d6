"""Houlsby adapters: one after each of a layer's two blocks."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Method,
    Published,
    Recipe,
    refuse_unusual_layers,
)
from unipelt_cli.methods.building_blocks import NearIdentityAdapter, train_norms


class Pair(nn.Module):
    """The two adapters of one layer: after attention and after the feed-forward block."""

    def __init__(self, layer: nn.Module, site: AttachContext, reduction: int) -> None:
        super().__init__()
        query = layer.get_submodule(site.layout.query)
        assert isinstance(query, nn.Linear)
        hidden = query.in_features
        bottleneck = max(1, hidden // reduction)
        self.attention = NearIdentityAdapter(hidden, bottleneck, site.generator)
        self.output = NearIdentityAdapter(hidden, bottleneck, site.generator)
        for path, adapter in (
            (site.layout.attention_added, self.attention),
            (site.layout.output_added, self.output),
        ):
            layer.get_submodule(path).register_forward_hook(_Adapt(adapter))


class _Adapt:
    """The hook that adds one adapter's output to a module's."""

    def __init__(self, adapter: nn.Module) -> None:
        self.adapter = adapter

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        added: Tensor = self.adapter(output)
        return output + added


@dataclass(frozen=True, config=CHECKS)
class Houlsby(Method):
    """Two near-identity bottlenecks a layer, each before a residual, and every layer norm."""

    reduction: Annotated[int, Field(ge=1, description="hidden size over bottleneck")] = 12

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        layout = site.layout
        layers = layout.layer_list(backbone)
        backbone.bottlenecks = nn.ModuleList(Pair(layer, site, self.reduction) for layer in layers)
        train_norms(backbone, layout)


METHODS = MappingProxyType(
    {
        "houlsby": Recipe(
            Houlsby(),
            1e-3,
            "additive",
            "two near-identity bottlenecks a layer, and every layer norm",
            "Houlsby et al. 2019",
            published=Published(3e-4, {"batch_size": 32, "warmup": 0.1, "weight_decay": 0.01}),
        ),
    }
)
