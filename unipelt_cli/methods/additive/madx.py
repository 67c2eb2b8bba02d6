"""MAD-X: a part that learns the language of the rows, and a task adapter stacked on it.

Pfeiffer et al. 2020 (arXiv 2005.00052). The language part, an adapter a layer and an invertible
adapter behind the embeddings, first learns to restore masked tokens; then it is frozen.

Unlike the paper it learns from the task's own rows, and for a few epochs. Where the checkpoint
holds its masked language model's head, that stands between the last states and the inverse of the
invertible adapter, as there; where it holds none (most sentence encoders), the inverse alone leads
to the embedding matrix, so that the loss is another one, and larger.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.errors import BackboneError
from unipelt_cli.methods.additive import compacter
from unipelt_cli.methods.base import CHECKS, AttachContext, Published, Recipe, Stage, TrainingBatch

LANGUAGE, TASK = "language", "task"


class HeadNames(NamedTuple):
    """What a checkpoint calls its masked language model's head, and the activation in it."""

    dense: str
    norm: str
    biases: tuple[str, ...]
    """The tokens' biases: one tensor, under either name."""
    activation: str | None = None
    """None where it is the layers' own."""


_BERT = HeadNames(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
)
_ROBERTA = HeadNames(
    "lm_head.dense", "lm_head.layer_norm", ("lm_head.bias", "lm_head.decoder.bias"), "gelu"
)
_ELECTRA = HeadNames(
    "generator_predictions.dense",
    "generator_predictions.LayerNorm",
    ("generator_lm_head.bias", "generator_lm_head.decoder.bias"),
    "gelu",
)
_DISTILBERT = HeadNames("vocab_transform", "vocab_layer_norm", ("vocab_projector.bias",))
HEADS = MappingProxyType(
    {
        "bert": _BERT,
        "roberta": _ROBERTA,
        "xlm-roberta": _ROBERTA,
        "electra": _ELECTRA,
        "distilbert": _DISTILBERT,
    }
)


class LanguageHead(nn.Module):
    """A checkpoint's own way from states to tokens: a dense layer, a norm, the tokens' biases.

    Frozen, and not stored: only the loss of the language part goes through it.
    """

    def __init__(self, tensors: Sequence[Tensor], activation: str, eps: float) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.dense_weight, self.dense_bias, self.norm_weight, self.norm_bias, self.bias = (
            nn.Parameter(tensor, requires_grad=False) for tensor in tensors
        )
        self.activation, self.eps = ACT2FN[activation], eps

    def forward(self, states: Tensor) -> Tensor:  # (M, D) -> (M, D)
        inner = self.activation(functional.linear(states, self.dense_weight, self.dense_bias))
        shape = self.norm_weight.shape
        return functional.layer_norm(inner, shape, self.norm_weight, self.norm_bias, self.eps)


def read_head(backbone: Any, site: AttachContext) -> LanguageHead | None:
    """Return the checkpoint's head for restoring tokens, or None where it holds none.

    Raises BackboneError where parts of it are missing or of other shapes than the backbone's.
    """
    names, config = HEADS[site.layout.model_type], backbone.config
    vocabulary, hidden = backbone.get_input_embeddings().weight.shape
    wanted = (  # bert-base's norms still have the names that TensorFlow gave them
        ((hidden, hidden), (f"{names.dense}.weight",)),
        ((hidden,), (f"{names.dense}.bias",)),
        ((hidden,), (f"{names.norm}.weight", f"{names.norm}.gamma")),
        ((hidden,), (f"{names.norm}.bias", f"{names.norm}.beta")),
        ((vocabulary,), names.biases),
    )
    held = site.read([name for _, either in wanted for name in either])
    if not held:
        return None
    tensors = []
    for shape, either in wanted:
        tensor = next((held[name] for name in either if name in held), None)
        if tensor is None or tensor.shape != shape:
            raise BackboneError(
                f"the checkpoint's head for masked tokens lacks or misshapes {either[0]}",
                "give a whole checkpoint, or one without that head",
            )
        tensors.append(tensor)
    activation = names.activation or getattr(config, site.layout.activation)
    return LanguageHead(tensors, activation, getattr(config, "layer_norm_eps", 1e-12))


class Corruption:
    """Which tokens a masked language model has to restore, and what stands in their place."""

    def __init__(self, site: AttachContext, vocabulary: int, share: float) -> None:
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
    of what the states said before: hence its short stage and low rate, and a bottleneck no wider
    than the task's, where the paper's reduces by 2. Raise all three with the rows.
    """

    reduction: Annotated[int, Field(ge=1, description="hidden size over bottleneck")] = 16
    language_reduction: Annotated[
        int | None, Field(ge=1, description="the language part's own (the paper's: 2)")
    ] = field(default=None)
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

    def attach(self, backbone: Any, site: AttachContext) -> None:
        configs = {
            LANGUAGE: compacter.bottleneck(
                self.language_reduction or self.reduction,
                inv_adapter="nice",
                inv_adapter_reduction_factor=2,
            ),
            TASK: compacter.bottleneck(self.reduction),
        }
        compacter.add(backbone, configs, site.generator)
        is_counted = backbone.get_input_embeddings().weight.is_meta  # a skeleton has no weights
        backbone.language_head = None if site.folded or is_counted else read_head(backbone, site)
        backbone.corruption = Corruption(site, backbone.config.vocab_size, self.masked)
        self.enter_stage(backbone, 1 if site.folded else 0)

    def enter_stage(self, backbone: Any, stage: int) -> None:
        """Train the language part alone, then the task adapter on the frozen language part."""
        compacter.activate(backbone, *((LANGUAGE,) if stage == 0 else (LANGUAGE, TASK)))
        for trains, name in ((stage == 0, LANGUAGE), (stage == 1, TASK)):
            for parameter in compacter.tensors(backbone, name).values():
                parameter.requires_grad_(trains)

    def loss(self, step: TrainingBatch) -> Tensor:
        return super().loss(step) if step.moment.stage else _restoring(step.backbone, step.inputs)

    def rate(self, name: str) -> float:
        return self.language_rate if f".{LANGUAGE}." in name else 1.0

    def trainable(self, backbone: nn.Module) -> int:
        """Count both stages' numbers."""
        stored = self.fold(backbone)
        others = (p for name, p in backbone.named_parameters() if name not in stored)
        return sum(p.numel() for p in stored.values()) + sum(
            p.numel() for p in others if p.requires_grad
        )

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return both parts, whichever trains now."""
        both = compacter.tensors(backbone, LANGUAGE) | compacter.tensors(backbone, TASK)
        return {name: parameter.detach() for name, parameter in both.items()}


def _restoring(backbone: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of restoring masked tokens.

    States go through the checkpoint's own head, if it has one, and back through the inverse of the
    invertible adapter to the embeddings' space, where the embedding matrix gives tokens' logits.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    corrupted, chosen = backbone.corruption(ids, mask)
    matrix, head = backbone.get_input_embeddings().weight, backbone.language_head
    rough = matrix.dtype == torch.bfloat16
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=rough):
        states = backbone(**{**inputs, "input_ids": corrupted}).last_hidden_state[chosen]
        states = states if head is None else head(states)
        inverse = backbone.invertible_adapters[LANGUAGE](states[:, None], rev=True)
        logits = functional.linear(inverse[:, 0], matrix, None if head is None else head.bias)
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
