"""Soft tokens among a row's embeddings.

Lester et al. 2021 (arXiv 2104.08691). They stand after the first token, which the pooler reads,
and are gone from what the backbone returns, so that pooling sees the row's own tokens alone.
Shapes: batch B, tokens T, soft tokens L, width of the embeddings E.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Gates,
    Method,
    NoKnownForm,
    Published,
    Recipe,
    refuse_unusual_layers,
)


class Prompt(nn.Module):
    """The soft tokens and the hooks that put them in and take them out: `backbone.prompt`.

    The backbone is shown a longer row, so that its masks are long enough; its embeddings are
    shown the row's own tokens, so that these keep their positions.
    """

    def __init__(self, backbone: nn.Module, rows: Tensor, layout: Layout) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)  # (L, E)
        embeddings = backbone.get_submodule(layout.embedding_norm.rpartition(".")[0])
        self.has_types = hasattr(embeddings, "token_type_embeddings")
        backbone.register_forward_pre_hook(self._lengthen, with_kwargs=True)
        embeddings.register_forward_pre_hook(self._shorten, with_kwargs=True)
        backbone.get_submodule(layout.embedding_norm).register_forward_hook(self._insert)
        backbone.register_forward_hook(self._drop)

    def _lengthen(self, backbone: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if self.has_types and kwargs.get("token_type_ids") is None:
            # The library's own default is only as long as there are positions.
            kwargs = {**kwargs, "token_type_ids": torch.zeros_like(kwargs["input_ids"])}
        longer = {}
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            if (tensor := kwargs.get(name)) is not None:
                # A copy of the first token stands in: it has mask 1, and is never embedded.
                longer[name] = self._put_in(tensor, tensor[:, :1].expand(-1, len(self.rows)))
        return args, {**kwargs, **longer}

    def _shorten(self, embeddings: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
        def shortened(value: Any) -> Any:
            return self._take_out(value) if isinstance(value, Tensor) else value

        return tuple(map(shortened, args)), {
            name: shortened(value) for name, value in kwargs.items()
        }

    def _insert(self, norm: nn.Module, args: Any, output: Tensor) -> Tensor:
        rows = self.rows.to(output.dtype).expand(output.shape[0], -1, -1)
        return self._put_in(output, rows)

    def _drop(self, backbone: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = self._take_out(output.last_hidden_state)
        return output

    @staticmethod
    def _put_in(tensor: Tensor, inserted: Tensor) -> Tensor:  # (B, T, ...), (B, L, ...)
        return torch.cat([tensor[:, :1], inserted, tensor[:, 1:]], dim=1)

    def _take_out(self, tensor: Tensor) -> Tensor:  # (B, L + T, ...) -> (B, T, ...)
        return torch.cat([tensor[:, :1], tensor[:, 1 + len(self.rows) :]], dim=1)


@dataclass(frozen=True, config=CHECKS)
class PromptTuning(Method):
    """Train a few soft tokens: rows of the embedding output, without positions.

    Unlike the paper they start as words from the whole vocabulary, unused ones too (no tokenizer
    says which 5,000 are the commonest), are 10, not 100, and train with AdamW, not Adafactor.
    """

    length: Annotated[int, Field(ge=1, le=256, description="soft tokens")] = 10
    start: Annotated[
        Literal["vocabulary", "uniform"],
        Field(description="soft tokens start as words drawn from the vocabulary, or uniform"),
    ] = "vocabulary"

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)
        if hasattr(config, "relative_attention_num_buckets"):
            yield (
                f"{layout.model_type} counts how far tokens are apart, and soft tokens would "
                "push the first from the rest",
                "choose a backbone with absolute positions, such as bert-base-uncased",
            )

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone.prompt = Prompt(backbone, self._rows(backbone, site), site.layout)

    def _rows(self, backbone: nn.Module, site: AttachContext) -> Tensor:
        """Draw the soft tokens at the scale that the embedding norm gives to words."""
        table = backbone.get_input_embeddings().weight  # type: ignore[operator]
        norm = backbone.get_submodule(site.layout.embedding_norm)
        assert isinstance(table, Tensor)
        if self.start == "uniform":
            rows = torch.empty(self.length, table.shape[1])
            return rows.uniform_(-0.5, 0.5, generator=site.generator)
        chosen = torch.randint(len(table), (self.length,), generator=site.generator)
        with torch.no_grad():
            rows = norm(table[chosen]).float()
        # A skeleton on the meta device has no numbers, and needs only the shape.
        return torch.zeros(rows.shape) if rows.is_meta else rows

    def as_low_rank_or_rescaling(
        self, backbone: nn.Module, part: str | None = None, gates: Gates = ()
    ) -> Any:
        raise NoKnownForm("its soft tokens stand after the first token, and PEFT's before it")

    def decays(self, name: str) -> bool:
        return False  # zero is no neutral place for a token


METHODS = MappingProxyType(
    {
        "prompt": Recipe(
            PromptTuning(),
            1e-2,
            "additive",
            "soft tokens after the first one",
            "Lester et al. 2021",
            published=Published(0.3, optimizer="Adafactor"),
        ),
    }
)
