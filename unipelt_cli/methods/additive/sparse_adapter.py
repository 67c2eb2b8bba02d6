"""SparseAdapter: adapters pruned before they train."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.additive.houlsby import Houlsby
from unipelt_cli.methods.base import CHECKS, AttachContext, Losses, Method, Recipe, StagePosition
from unipelt_cli.methods.unipelt.method import Submodules


class Sparsity(nn.Module):
    """Which entries of the adapters' matrices are kept, all matrices in a row.

    It is found again from the train rows when a run goes on, so it is no buffer.
    """

    def __init__(self, names: tuple[str, ...], entries: int, kept: int) -> None:
        super().__init__()
        self.names, self.entries, self.kept = names, entries, kept
        self.mask: Tensor | None = None  # (entries,) bool, once the rows were seen


@dataclass(frozen=True, config=CHECKS)
class SparseAdapter(Method):
    """Wide adapters of which a share of the entries is kept, chosen once before training.

    He et al. 2022 (arXiv 2210.04284). SNIP scores |weight * gradient|; what is not kept is zero
    from the start and stays so. Biases are kept whole.
    """

    base: Annotated[
        Literal["pfeiffer", "houlsby"], Field(description="which adapter is made sparse")
    ] = "pfeiffer"
    reduction: Annotated[int, Field(ge=1, description="hidden size over bottleneck")] = 8
    kept: Annotated[float, Field(gt=0, le=1, description="share of entries that are kept")] = 0.5
    score: Annotated[
        Literal["snip", "random"], Field(description="how the kept entries are chosen")
    ] = "snip"
    score_rows: Annotated[int, Field(ge=1, description="train rows that SNIP looks at")] = 512

    @property
    def _base(self) -> Method:
        if self.base == "houlsby":
            return Houlsby(self.reduction)
        return Submodules(("adapter",), gated=False, reduction=self.reduction)

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from self._base.refusals(layout, config)

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone_names = {name for name, _ in backbone.named_parameters()}
        self._base.attach(backbone, site)
        matrices = {
            name: parameter
            for name, parameter in backbone.named_parameters()
            if name not in backbone_names and parameter.ndim == 2
        }
        entries = sum(matrix.numel() for matrix in matrices.values())
        kept = max(1, round(self.kept * entries))
        backbone.sparsity = Sparsity(tuple(matrices), entries, kept)
        if self.score == "random":
            scores = torch.rand(entries, generator=site.generator)
            _sparsity(backbone).mask = _best(scores, kept)

    def prepare(self, backbone: nn.Module, losses: Losses) -> None:
        """Score the entries by the train rows' gradients, unless chance has chosen already."""
        sparsity = _sparsity(backbone)
        matrices = _matrices(backbone)
        if self.score == "snip":
            for loss in losses(16, self.score_rows):
                torch.autograd.backward(loss)
            scores = [(m.detach() * m.grad).abs() for m in matrices if m.grad is not None]
            sparsity.mask = _best(torch.cat([score.flatten() for score in scores]), sparsity.kept)
        with torch.no_grad():
            for matrix, mask in zip(matrices, _masks(backbone), strict=True):
                matrix.mul_(mask)

    def after_backward(self, backbone: nn.Module, moment: StagePosition) -> None:
        """Give entries that are not kept no gradient: at zero, decay leaves them there too."""
        for matrix, mask in zip(_matrices(backbone), _masks(backbone), strict=True):
            if matrix.grad is not None:
                matrix.grad.mul_(mask)

    def trainable(self, backbone: nn.Module) -> int:
        sparsity = _sparsity(backbone)
        return super().trainable(backbone) - sparsity.entries + sparsity.kept

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return the kept entries, one bit an entry that says which, and the dense tensors."""
        sparsity = _sparsity(backbone)
        stored = super().fold(backbone)
        flat = torch.cat([stored.pop(name).flatten() for name in sparsity.names])
        mask = torch.cat([mask.flatten() for mask in _masks(backbone)])
        return stored | {"sparsity.kept": flat[mask], "sparsity.bits": _pack(mask)}

    def unfold(self, backbone: nn.Module, stored: Mapping[str, Tensor]) -> None:
        sparsity = _sparsity(backbone)
        dense = dict(stored)
        values, bits = dense.pop("sparsity.kept"), dense.pop("sparsity.bits")
        matrices = _matrices(backbone)
        device = matrices[0].device
        sparsity.mask = _unpack(bits.to(device), sparsity.entries)
        flat = torch.zeros(sparsity.entries, device=device)
        flat[sparsity.mask] = values.to(device)
        with torch.no_grad():
            for matrix, part in zip(matrices, _split(flat, matrices), strict=True):
                matrix.copy_(part)
        super().unfold(backbone, dense)


def _sparsity(backbone: nn.Module) -> Sparsity:
    sparsity = backbone.sparsity
    assert isinstance(sparsity, Sparsity)
    return sparsity


def _matrices(backbone: nn.Module) -> list[nn.Parameter]:
    return [backbone.get_parameter(name) for name in _sparsity(backbone).names]


def _masks(backbone: nn.Module) -> list[Tensor]:
    """Return each matrix's mask; before rows were seen, one that keeps as many entries."""
    sparsity, matrices = _sparsity(backbone), _matrices(backbone)
    if sparsity.mask is None:
        sparsity.mask = torch.arange(sparsity.entries) < sparsity.kept
    return _split(sparsity.mask.to(matrices[0].device), matrices)


def _split(flat: Tensor, matrices: list[nn.Parameter]) -> list[Tensor]:
    parts = torch.split(flat, [matrix.numel() for matrix in matrices])
    return [part.view(matrix.shape) for part, matrix in zip(parts, matrices, strict=True)]


def _best(scores: Tensor, kept: int) -> Tensor:
    """Return a mask of the highest scores; of equal ones the first, on every machine."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:kept]] = True
    return mask


def _pack(mask: Tensor) -> Tensor:  # (entries,) bool -> (entries / 8 rounded up,) uint8
    padded = nn.functional.pad(mask, (0, -len(mask) % 8)).view(-1, 8)
    places = 2 ** torch.arange(8, device=mask.device)
    return (padded * places).sum(1).to(torch.uint8)


def _unpack(bits: Tensor, entries: int) -> Tensor:
    places = torch.arange(8, device=bits.device)
    return ((bits[:, None].int() >> places) & 1).flatten()[:entries].bool()


METHODS = MappingProxyType(
    {
        "sparse-adapter": Recipe(
            SparseAdapter(),
            1e-3,
            "unified",
            "adapters twice as wide, half of their entries kept",
            "He et al. 2022 (SparseAdapter)",
        ),
    }
)
