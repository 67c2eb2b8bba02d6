"""LoReFT: edits of the hidden states in a learned subspace of very few dimensions.

Wu et al. 2024 (arXiv 2404.03592): h + R^T (W h + b - R h) behind a layer, R (r, D) with
orthonormal rows. Ours rather than the `adapters` library's, whose orthogonal R is a product with a
random (D, D) matrix for every layer that would have to be stored.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Method,
    Published,
    Recipe,
    refuse_unusual_layers,
)
from unipelt_cli.methods.building_blocks import new_linear


class Edit(nn.Module):
    """One layer's edit; `rows` spans the subspace, and is orthonormal itself once folded."""

    def __init__(self, hidden: int, rank: int, generator: Generator, folded: bool) -> None:
        super().__init__()
        self.folded = folded
        drawn = torch.empty(rank, hidden).normal_(generator=generator)
        self.rows = nn.Parameter(_orthonormal(drawn))
        self.target = new_linear(hidden, rank, generator)

    def projection(self) -> Tensor:
        """Return R (r, D)."""
        return self.rows if self.folded else _orthonormal(self.rows)

    def forward(self, h: Tensor, chosen: Tensor) -> Tensor:
        """Edit states (B, T, D) where `chosen` (B, T, 1) is 1, in float32 throughout."""
        with torch.autocast(h.device.type, enabled=False):
            states, rows = h.float(), self.projection()
            wanted = functional.linear(states, self.target.weight - rows, self.target.bias)
            return h + (chosen * (wanted @ rows)).to(h.dtype)


class Edits(nn.Module):
    """The edits of all layers: `backbone.edits`; its methods are the hooks."""

    def __init__(
        self, backbone: nn.Module, site: AttachContext, rank: int, first: int | None
    ) -> None:
        super().__init__()
        self.first = first
        self.chosen: Tensor | None = None  # (B, T, 1), of this forward pass
        self.layers = nn.ModuleList()
        backbone.register_forward_pre_hook(self._choose, with_kwargs=True)
        for layer in site.layout.layer_list(backbone):
            query = layer.get_submodule(site.layout.query)
            assert isinstance(query, nn.Linear)
            edit = Edit(query.in_features, rank, site.generator, site.folded)
            norm = layer.get_submodule(site.layout.output_norm)  # its output is the layer's
            norm.register_forward_hook(_Behind(self, edit))
            self.layers.append(edit)

    def _choose(self, backbone: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        mask: Tensor = kwargs["attention_mask"]
        if self.first is not None:
            mask = mask * (mask.cumsum(1) <= self.first)
        self.chosen = mask[:, :, None].float()


class _Behind:
    """The hook that edits a layer's output."""

    def __init__(self, edits: Edits, edit: Edit) -> None:
        self.edits, self.edit = edits, edit

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        edited: Tensor = self.edit(output, self.edits.chosen)
        return edited


@dataclass(frozen=True, config=CHECKS)
class LoReFT(Method):
    """Move every layer's states, within a subspace, to where a linear unit says they should be.

    The paper edits the first tokens; a head that averages over tokens would hardly see that, so
    the default edits all of them. Padding is never touched. W starts N(0, 0.02) and b at 0,
    as linear units do here; the authors' code leaves both to torch, and drops out 0.05 of a state.
    """

    rank: Annotated[int, Field(ge=1, le=256, description="dimensions of the subspace")] = 1
    first_tokens: Annotated[
        int | None, Field(ge=1, description="edit only so many first tokens (all if unset)")
    ] = None

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)
        if self.rank > config.hidden_size:
            yield (
                f"its states have {config.hidden_size} dimensions, the subspace {self.rank}",
                f"set method.rank={config.hidden_size} or less",
            )

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone.edits = Edits(backbone, site, self.rank, self.first_tokens)

    def decays(self, name: str) -> bool:
        return False  # a row's length means nothing, and W = 0 is no neutral edit

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return the trained tensors with the rows made orthonormal for good."""
        stored = super().fold(backbone)
        assert isinstance(backbone.edits, Edits)
        for index, edit in enumerate(backbone.edits.layers):
            assert isinstance(edit, Edit)
            stored[f"edits.layers.{index}.rows"] = edit.projection().detach()
        return stored


def _orthonormal(rows: Tensor) -> Tensor:
    """Return orthonormal rows that span what `rows` (r, D) span, each on its row's own side."""
    q, r = torch.linalg.qr(rows.float().T)
    turned: Tensor = q * r.diagonal().sign()
    return turned.T.contiguous()


METHODS = MappingProxyType(
    {
        "loreft": Recipe(
            LoReFT(),
            4e-3,
            "additive",
            "edits of every layer's states within a subspace",
            "Wu et al. 2024",
            published=Published(6e-4, {"batch_size": 32, "warmup": 0.09}, {"first_tokens": 1}),
        ),
    }
)
