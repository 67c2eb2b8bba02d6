"""Adapter, prefix, LoRA and others as submodules of every layer, each behind a learned gate.

Mao et al. 2022 (arXiv 2110.07577): what a union attaches, folds and merges, and the table of them.

`prefix` and `mam` start their prefix as UniPELT does, at a deviation of 0.005. Li and Liang's and
He et al.'s code draws the table N(0, 1), and the latter's prefix starts at 0.26: on minilm with a
hundred rows that was worse on dev (`mam` on the demo: 0.810 against 0.845). `mam` drops out in its
bottleneck as their code does (0.845 with and without); `parallel-adapter` does not, for nobody
measured it. `--preset published/mam` and `published/prefix` have all of it as the papers.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unipelt_cli.methods.base import CHECKS, AttachContext, Gates, NoKnownForm, Published, Recipe
from unipelt_cli.methods.building_blocks import LowRank
from unipelt_cli.methods.few_labels import FEW_LABELS
from unipelt_cli.methods.forms import LowRankUpdates
from unipelt_cli.methods.unipelt.container import Container, FusedLayers
from unipelt_cli.methods.unipelt.fused.stack import PARTS, Stack
from unipelt_cli.methods.unipelt.inspection import container_of
from unipelt_cli.methods.unipelt.layer import THIRDS, LayerSubmodules
from unipelt_cli.methods.unipelt.settings import UnionSettings
from unipelt_cli.system.row_threads import shared_out

MERGEABLE = frozenset({"lora", "bias"})
"""The parts that a plain backbone's weights can hold, where no gate opens them."""


@dataclass(frozen=True, config=CHECKS)
class Submodules(UnionSettings):
    """Any union of adapter, prefix, LoRA, bias and parallel adapter, with or without gates."""

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone.submodules = Container(backbone, self, site)

    def accelerate(self, backbone: nn.Module, site: AttachContext) -> bool:
        """Put fused layers in the library's place where they compute the same."""
        layout, config = site.layout, cast(Any, backbone.config)
        container = container_of(backbone)
        fits = (
            layout.is_plain
            and layout.has_plain_scores
            and not self.leave_out
            and getattr(config, layout.activation, None) == "gelu"
            and PARTS.issuperset(self.parts)
            and self.gate_pooling == "masked"
            and not any(len(cast(LayerSubmodules, layer).task_gates) for layer in container.layers)
        )
        if fits:
            container.stack = Stack(backbone, container, self.lora_factor, is_stored=site.folded)
        return fits

    def joint(self, backbone: nn.Module) -> FusedLayers | None:
        """Return the fused layers, where they are in place."""
        return container_of(backbone).stack

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return the trained tensors with the prefix MLP folded away, which is exact."""
        container = container_of(backbone)
        stored = {
            name: tensor
            for name, tensor in super().fold(backbone).items()
            if not name.startswith("submodules.prefix.")
        }
        if container.prefix is not None:
            # With as many threads as in a pass: other sums would be other numbers in bf16.
            with torch.no_grad(), shared_out(container.stack is not None):
                stored["submodules.prefix.rows"] = container.prefix().contiguous()
        return stored

    def as_low_rank_or_rescaling(
        self, backbone: nn.Module, part: str | None = None, gates: Gates = ()
    ) -> LowRankUpdates:
        """Return LoRA alone as what it is, and what stands beside it only if asked for a part."""
        if part is None and self.gated:
            raise NoKnownForm("its gates depend on the input")
        if part is None and self.parts == ("prefix",):
            raise NoKnownForm("PEFT's prefix moves a row's positions, and this one does not")
        if part is None and self.parts != ("lora",):
            names = [_NAMES.get(name, name) for name in self.parts if name != "lora"]
            raise NoKnownForm(f"PEFT does not have its {' and '.join(names)}")
        if part not in (None, "lora"):
            raise NoKnownForm(f"of UniPELT's parts PEFT has lora, not {part!r}")
        if "lora" not in self.parts:
            raise NoKnownForm("it has no LoRA")
        if any(part == "lora" for _, part in self.left_out):
            raise NoKnownForm("some of its layers have no LoRA")
        return _low_rank_updates(container_of(backbone), backbone, gates)

    @property
    def unmergeable(self) -> str | None:
        if self.gated:
            return "its gates depend on the input"
        if kept := set(self.parts) - MERGEABLE:
            names = [_NAMES.get(part, part) for part in sorted(kept)]
            return f"no plain weight computes what its {' and '.join(names)} does"
        return None

    def merge(self, backbone: nn.Module) -> None:
        """Add ungated LoRA and biases to the weights they stand beside, in float32."""
        super().merge(backbone)
        container = container_of(backbone)
        with torch.no_grad():
            for (row, layer), submodules in zip(container.sites, container.layers, strict=True):
                assert isinstance(submodules, LayerSubmodules)
                submodules.merge_into(layer, row)
        for handle in container.handles:
            handle.remove()
        if container.stack is not None:
            container.stack.leave()
        del backbone.submodules


_NAMES = {"parallel": "parallel adapter"}
_MAO = "Mao et al. 2022"
_PAPERS = {"epochs": 50, "patience": 10, "batch_size": 16, "warmup": 0.0}
_GATED = Published(5e-4, _PAPERS, {"reduction": 16, "rank": 8, "lora_scale": 1.0, "gate_rate": 1.0})
_UNGATED = Published(5e-4, _PAPERS, {"reduction": 16, "rank": 8, "lora_scale": 2.0})
_WIDE: dict[str, Any] = {"reduction": 4, "rank": 32, "lora_scale": 4.0}
"""What few labels on a small encoder want: the paper's sizes leave minilm a bottleneck of 24."""
_GATES: dict[str, Any] = {"gate_rate": 10.0}
"""The rate of gates beside that of what they open: at the same one 120 steps hardly move them."""
_HE = {"epochs": 10, "batch_size": 32, "warmup": 0.06, "weight_decay": 0.1}
_HES_PREFIX = {"prefix_width": 800, "prefix_std": 1.0, "prefix_start": "uniform"}
METHODS = MappingProxyType(
    {
        "unipelt-ap": Recipe(
            Submodules(("adapter", "prefix"), reduction=4, **_GATES),
            3e-4,
            "hybrid",
            "adapter + prefix, gated",
            _MAO,
            True,
            published=_GATED,
            settings=FEW_LABELS,
        ),
        "unipelt-apl": Recipe(
            Submodules(**_WIDE, **_GATES),
            3e-4,
            "hybrid",
            "adapter + prefix + LoRA, gated",
            _MAO,
            True,
            published=_GATED,
            settings=FEW_LABELS,
        ),
        "unipelt-aplb": Recipe(
            Submodules(("adapter", "prefix", "lora", "bias"), **_WIDE, **_GATES),
            3e-4,
            "hybrid",
            "adapter + prefix + LoRA + bias, gated",
            "ours, after Mao et al. 2022",
            settings=FEW_LABELS,
        ),
        "ap-ungated": Recipe(
            Submodules(("adapter", "prefix"), gated=False, reduction=4),
            3e-4,
            "hybrid",
            "the control of unipelt-ap",
            _MAO,
            published=_UNGATED,
            settings=FEW_LABELS,
        ),
        "apl-ungated": Recipe(
            Submodules(gated=False, **_WIDE),
            3e-4,
            "hybrid",
            "the control of unipelt-apl",
            _MAO,
            published=_UNGATED,
            settings=FEW_LABELS,
        ),
        "adapter": Recipe(
            Submodules(("adapter",), gated=False),
            1e-3,
            "additive",
            "one bottleneck a layer, after the feed-forward block",
            "Pfeiffer et al. 2021",
            True,
            published=Published(1e-4),
        ),
        "prefix": Recipe(
            Submodules(("prefix",), gated=False),
            2e-4,
            "additive",
            "learned keys and values in every layer",
            "Li and Liang 2021",
            published=Published(5e-5, method={"prefix_std": 1.0, "prefix_start": "uniform"}),
        ),
        "lora": Recipe(
            Submodules(("lora",), gated=False),
            5e-4,
            "reparameterised",
            "low-rank updates of query and value",
            "Hu et al. 2022",
            True,
            published=Published(4e-4, {"epochs": 30, "warmup": 0.06, "weight_decay": 0.1}),
        ),
        "parallel-adapter": Recipe(
            Submodules(("parallel",), gated=False),
            1e-3,
            "additive",
            "one scaled bottleneck a layer, beside the feed-forward block",
            "He et al. 2022",
            published=Published(1e-4, _HE, {"parallel_dropout": 0.1}),
        ),
        "mam": Recipe(
            Submodules(("prefix", "parallel"), gated=False, prefix_length=16, parallel_dropout=0.1),
            1e-3,
            "hybrid",
            "prefix + scaled parallel adapter",
            "He et al. 2022",
            published=Published(1e-4, _HE, {**_HES_PREFIX, "parallel_dropout": 0.1}),
        ),
        "union": Recipe(
            Submodules(),
            5e-4,
            "hybrid",
            "whichever parts you name, gated or not",
            "ours, after Mao et al. 2022",
        ),
    }
)


def _low_rank_updates(container: Container, backbone: nn.Module, gates: Gates) -> LowRankUpdates:
    """Return the LoRA of every layer; where they are gated, its gate's value is in B."""
    layout, layers = container.layout, cast(Sequence[LayerSubmodules], container.layers)
    rows = (layout, *layout.more)
    sites = [(row, path) for row in rows for path in row.layer_paths(backbone)]
    if gates and (layout.more or len(gates) != len(sites)):
        raise NoKnownForm(f"in {layout.model_type} not every layer has a gate of its own")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for layer_index, ((row, path), submodules) in enumerate(zip(sites, layers, strict=True)):
        layer_pairs = _pairs(submodules, gates[layer_index] if gates else {})
        if row.fused:
            layer_pairs = {"query": _fused(layer_pairs)}
        pairs |= {f"{path}.{getattr(row, name)}": pair for name, pair in layer_pairs.items()}
    rank = len(next(iter(pairs.values()))[0])
    return LowRankUpdates(rank, layers[0].scale, pairs)


def _pairs(
    submodules: LayerSubmodules, gates: Mapping[str, float]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a layer's A and B by projection, with its gate's value in B if there is one."""
    pairs = {}
    for name, low_rank in submodules.lora.items():
        assert isinstance(low_rank, LowRank)
        gate = gates.get("lora", gates.get(f"lora_{name}", 1.0))
        pairs[name] = low_rank.a.detach(), gate * low_rank.b.detach()
    return pairs


def _fused(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return one pair for the unit whose output is in thirds: ranks stand beside each other."""
    columns = []
    for name, (_, b) in pairs.items():
        thirds = [b if name == third else torch.zeros_like(b) for third in THIRDS]
        columns.append(torch.cat(thirds))
    return torch.cat([a for a, _ in pairs.values()]), torch.cat(columns, dim=1)
