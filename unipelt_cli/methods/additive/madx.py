"""MAD-X: a part that learns the language of the rows, and a task adapter stacked on it.

Pfeiffer et al. 2020 (arXiv 2005.00052). The language part, an adapter a layer and an invertible
adapter behind the embeddings, first learns to restore masked tokens; then it is frozen.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.additive import compacter
from unipelt_cli.methods.base import (
    CHECKS,
    Pass,
    Published,
    Recipe,
    Site,
    Stage,
)

LANGUAGE, TASK = "language", "task"


class Corruption:
    """Which tokens a masked language model has to restore, and what stands in their place."""

    def __init__(self, site: Site, vocabulary: int, share: float) -> None:
        self.mask_id, self.vocabulary, self.share = site.mask_id, vocabulary, share
        self.special_ids = torch.tensor(sorted(site.special_ids), dtype=torch.long)

    def __call__(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return corrupted ids (B, T) and where to restore them (B, T): at least once a row.

        Of the chosen, 80 % become [MASK], 10 % random tokens, and 10 % stay. A tokenizer without
        [MASK] gives random tokens in its place. Draws from the global generator.
        """
        text = mask.bool() & ~torch.isin(ids, self.special_ids.to(ids.device))
        scores = torch.rand(ids.shape, device=ids.device).masked_fill(~text, 2.0)
        chosen = text & ((scores < self.share) | (scores == scores.min(1, keepdim=True).values))
        drawn = torch.randint(self.vocabulary, ids.shape, device=ids.device)
        masked = drawn if self.mask_id is None else torch.full_like(ids, self.mask_id)
        fate = torch.rand(ids.shape, device=ids.device)
        corrupted = torch.where(chosen & (fate < 0.8), masked, ids)
        return torch.where(chosen & (fate >= 0.9), drawn, corrupted), chosen


@dataclass(frozen=True, config=CHECKS)
class MadX(compacter.OfLibrary):
    """A part for the text's language, learned without labels, and an adapter for the task on it.

    A hundred rows teach the language part little more than how common each token is, at the cost
    of what the states said before: hence its short stage and low rate. Raise both with the rows.
    """

    reduction: Annotated[int, Field(ge=1, description="hidden size over bottleneck")] = 16
    language_share: Annotated[
        float, Field(gt=0, le=10, description="epochs for the language part, over the task's")
    ] = 0.2
    language_rate: Annotated[
        float, Field(gt=0, description="the language part's learning rate, over the task's")
    ] = 0.1
    masked: Annotated[float, Field(gt=0, lt=1, description="share of tokens to restore")] = 0.15

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from super().refusals(layout, config)
        size = getattr(config, "embedding_size", config.hidden_size)
        if size != config.hidden_size:
            yield (
                f"its embeddings have {size} dimensions and its states {config.hidden_size}, so "
                "that the inverse does not lead from one to the other",
                "choose another backbone",
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        return Stage(self.language_share, selects=False), Stage()

    def attach(self, backbone: Any, site: Site) -> None:
        configs = {
            LANGUAGE: compacter.bottleneck(
                self.reduction, inv_adapter="nice", inv_adapter_reduction_factor=2
            ),
            TASK: compacter.bottleneck(self.reduction),
        }
        compacter.add(backbone, configs, site.generator)
        backbone.corruption = Corruption(site, backbone.config.vocab_size, self.masked)
        self.enter(backbone, 1 if site.folded else 0)

    def enter(self, backbone: Any, stage: int) -> None:
        """Train the language part alone, then the task adapter on the frozen language part."""
        compacter.activate(backbone, *((LANGUAGE,) if stage == 0 else (LANGUAGE, TASK)))
        for trains, name in ((stage == 0, LANGUAGE), (stage == 1, TASK)):
            for parameter in compacter.tensors(backbone, name).values():
                parameter.requires_grad_(trains)

    def loss(self, step: Pass) -> Tensor:
        return super().loss(step) if step.moment.stage else _restoring(step.backbone, step.inputs)

    def rate(self, name: str) -> float:
        return self.language_rate if f".{LANGUAGE}." in name else 1.0

    def trainable(self, backbone: nn.Module) -> int:
        """Count both stages' numbers."""
        own = self.fold(backbone)
        others = (p for name, p in backbone.named_parameters() if name not in own)
        return sum(p.numel() for p in own.values()) + sum(
            p.numel() for p in others if p.requires_grad
        )

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return both parts, whichever trains now."""
        both = compacter.tensors(backbone, LANGUAGE) | compacter.tensors(backbone, TASK)
        return {name: parameter.detach() for name, parameter in both.items()}


def _restoring(backbone: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of restoring masked tokens.

    States go back through the inverse of the invertible adapter to the embeddings' own space, and
    the embedding matrix gives the tokens' logits.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    corrupted, chosen = backbone.corruption(ids, mask)
    matrix = backbone.get_input_embeddings().weight
    rough = matrix.dtype == torch.bfloat16
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=rough):
        states = backbone(**{**inputs, "input_ids": corrupted}).last_hidden_state
        inverse = backbone.invertible_adapters[LANGUAGE](states[chosen][:, None], rev=True)
        logits = functional.linear(inverse[:, 0], matrix)
    summed = functional.cross_entropy(logits.float(), ids[chosen], reduction="sum")
    return summed / max(1, int(chosen.sum()))


METHODS = MappingProxyType(
    {
        "madx": Recipe(
            MadX(),
            5e-4,
            "additive",
            "a task adapter stacked on a part that learned the rows' language",
            "Pfeiffer et al. 2020",
            published=Published(1e-4, method={"language_reduction": 2, "language_rate": 1.0}),
        ),
    }
)
