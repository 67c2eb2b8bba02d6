"""All layers' submodules of one backbone, the prefix they share, and the hooks."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from torch.nn import functional

from unipelt_cli.errors import ConfigError
from unipelt_cli.methods.base import AttachContext, SharedPasses
from unipelt_cli.methods.building_blocks import Prefix
from unipelt_cli.methods.unipelt.attention import replace_attention
from unipelt_cli.methods.unipelt.gates import token_weights
from unipelt_cli.methods.unipelt.layer import ForwardState, LayerSubmodules, projection_width
from unipelt_cli.methods.unipelt.settings import UnionSettings


class FusedLayers(SharedPasses, Protocol):
    """What may stand in the place of the library's layers, and computes the same faster."""

    def begin(self, inputs: Mapping[str, Any]) -> bool:
        """Before a forward pass with these inputs: whether it is computed here, not by hooks."""

    def leave(self) -> None:
        """Give the library's layers their own forward passes back."""


class Container(nn.Module):
    """All submodules of a backbone: `backbone.submodules`."""

    def __init__(
        self,
        backbone: nn.Module,
        method: UnionSettings,
        site: AttachContext,
    ) -> None:
        super().__init__()
        layout, generator = site.layout, site.generator
        self.layout = layout
        self.sites = layout.sites(backbone)
        if beyond := [layer for layer, _ in method.left_out if layer >= len(self.sites)]:
            raise ConfigError(
                f"method.leave_out names layer {max(beyond)}: there is no such layer",
                f"the backbone's are 0 to {len(self.sites) - 1}",
            )
        without = {(layer, part) for layer, part in method.left_out if part == "prefix"}
        has_prefix = "prefix" in method.parts and len(without) < len(self.sites)
        self.state = ForwardState(method.prefix_length if has_prefix else 0)
        self.state.closed = frozenset(without)
        self.masked = method.gate_pooling == "masked"
        implementation = str(getattr(backbone.config, "_attn_implementation", "eager"))
        self.lengthens = has_prefix and implementation not in layout.own_attention
        self.layers = nn.ModuleList(
            LayerSubmodules(layer, row, method, index, self.state, generator)
            for index, (row, layer) in enumerate(self.sites)
        )
        self.prefix: Prefix | None = None
        if has_prefix:
            hidden = projection_width(self.sites[0][1], layout, "key")
            shape = (len(self.sites) - len(without), method.prefix_length, hidden)
            self.prefix = Prefix(
                shape,
                method.prefix_width,
                generator,
                site.folded,
                method.prefix_std,
                method.prefix_start,
            )
            if not self.lengthens:
                for (row, layer), submodules in zip(self.sites, self.layers, strict=True):
                    assert isinstance(submodules, LayerSubmodules)
                    module = layer.get_submodule(row.attention)
                    kind = layout.model_type, implementation
                    replace_attention(module, *kind, submodules.prefix_rows)
        self.stack: FusedLayers | None = None
        self.handles = [backbone.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for (row, layer), submodules in zip(self.sites, self.layers, strict=True):
            assert isinstance(submodules, LayerSubmodules)
            self.handles += submodules.hooks(layer, row, self.lengthens)

    def parameters_of_prefix(self) -> list[nn.Parameter]:
        """Return what the prefix is made from."""
        return [] if self.prefix is None else list(self.prefix.parameters())

    def _begin(self, backbone: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Before each forward pass: pool over the mask, make the prefix, lengthen the mask."""
        mask = kwargs["attention_mask"]
        self.state.is_fused = self.stack is not None and self.stack.begin(kwargs)
        if self.state.is_fused:
            return args, kwargs
        self.state.pooling = token_weights(mask, masked=self.masked)
        if self.state.recorded is not None:
            self.state.recorded.clear()
            self.state.recorded_sites.clear()
        if self.prefix is not None:
            self.state.prefix = self.prefix()
        if self.lengthens:
            lengthened = functional.pad(mask, (self.state.prefix_length, 0), value=1)
            kwargs = {**kwargs, "attention_mask": lengthened}
        return args, kwargs
