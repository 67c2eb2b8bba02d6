"""Where the parts of an encoder are that methods attach to: one row of the table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

Attention = Literal["eager", "sdpa"]
PARTS = ("adapter", "prefix", "lora", "bias")


@dataclass(frozen=True)
class NativeHead:
    """The head of the library's own sequence classifier, by the names it has there.

    With `pooler` the backbone's own pooler is read and the head is one linear unit; otherwise
    the head reads one token through `dense` and `activation`.
    """

    out: str
    dense: str | None = None
    activation: Literal["tanh", "gelu", "relu"] = "tanh"
    reads_last: bool = False
    """Whether it reads a row's last token, the end mark, and not the first."""

    @property
    def pooler(self) -> bool:
        return self.dense is None


@dataclass(frozen=True)
class Layout:
    """Where things are in one architecture; paths below `layers` are relative to one layer.

    `layers` names a list of layers, or with a `*` the lists in every group of a list of groups.
    """

    model_type: str
    classes: str
    layers: str
    query: str
    key: str
    value: str
    attention: str
    attention_output: str
    attention_norm: str
    intermediate: str
    output: str
    output_norm: str
    embedding_norm: str
    native: NativeHead | None
    """None where the head of the library's own sequence classifier is another than ours."""
    inside: str
    """The name of the backbone inside the library's own sequence classifier."""
    attention_added: str = "attention.output.dropout"
    output_added: str = "output.dropout"
    """Modules whose output, dropout included, is what each of two blocks adds to the residual."""
    attentions: tuple[Attention, ...] = ("eager", "sdpa")
    own_attention: tuple[Attention, ...] = ()
    """Implementations where a lengthened mask does not work: see `methods.unipelt.attention`."""
    position_offset: int = 0
    """Positions that the embedding table keeps for itself (RoBERTa counts from padding + 1)."""
    is_plain: bool = True
    """Whether its layers are BERT's: one stack, own weights each, a norm after each of two blocks,
    and a linear unit each for query, key and value."""

    has_plain_scores: bool = True
    """Whether attention reads scaled products alone, without a bias from positions."""
    activation: str = "hidden_act"
    """What the config calls the activation of the feed-forward block."""
    pooler: str = "pooler.dense"
    """The linear unit of the backbone's own pooler, where it has one."""
    also_biased: tuple[str, ...] = ()
    """More modules with a bias, outside the layers: which are there depends on the config."""
    also_biased_inside: tuple[str, ...] = ()
    """The same inside a layer, relative to it."""

    table: str | None = None
    """The attention's function that sends a table of positions through query and key as well."""

    adapted: str | None = None
    """The module whose output the adapter reads and adds to, where no norm ends a layer."""
    gates_read: str = ""
    """The module whose input opens the gates, where it is not the layer's own."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """The parts that this architecture cannot have, each with the reason."""
    no_native: str = ""
    """Why there is no native head, where there is none."""
    fused: bool = False
    """Whether query, key and value are thirds, in this order, of one linear unit's output."""
    also_read: Mapping[str, object] = field(default_factory=dict)
    """Settings that the library reads beside those its config class names, with defaults."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Values of the library's config that are set whatever the checkpoint says."""
    more: tuple["Layout", ...] = ()
    """The other attentions of the architecture, in a second stack or beside the first in it."""
    encoder_class: str = ""
    """The library's class of the backbone, where it is not the architecture's `Model`."""

    @property
    def model(self) -> str:
        """The name of the library's class of the backbone."""
        return self.encoder_class or f"{self.classes}Model"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that this architecture can have."""
        return tuple(part for part in PARTS if part not in self.lacks)

    @property
    def has_pooler(self) -> bool:
        """Whether the library's own classifier reads the backbone's pooler."""
        return self.native is not None and self.native.pooler

    def positions(self, config: Any) -> int | None:
        """Return how many tokens a row may have, or None where there is no bound."""
        positions = getattr(config, "max_position_embeddings", None)
        return None if positions is None else positions - self.position_offset

    def layer_paths(self, backbone: nn.Module) -> list[str]:
        """Return the paths of the layers of a backbone of this architecture."""
        outer, star, inner = self.layers.partition(".*.")
        lists = [self.layers]
        if star:
            groups = backbone.get_submodule(outer).named_children()
            lists = [f"{outer}.{name}.{inner}" for name, _ in groups]
        return [
            f"{path}.{name}"
            for path in lists
            for name, _ in backbone.get_submodule(path).named_children()
        ]

    def layer_list(self, backbone: nn.Module) -> nn.ModuleList:
        """Return the layers of a backbone of this architecture."""
        return nn.ModuleList(backbone.get_submodule(path) for path in self.layer_paths(backbone))

    def sites(self, backbone: nn.Module) -> list[tuple["Layout", nn.Module]]:
        """Return every attention's layer, with the row that describes it."""
        rows = (self, *self.more)
        return [(row, layer) for row in rows for layer in row.layer_list(backbone)]

    def all_biased(self, backbone: nn.Module) -> list[nn.Module]:
        """Return the modules with a bias, in and outside the layers, without a pooler."""
        outside = (self.embedding_norm, *self.also_biased)
        modules = dict(backbone.named_modules())
        paths = list(outside)
        for row in (self, *self.more):
            inside = (*row.biased(), *row.also_biased_inside)
            paths += [f"{layer}.{path}" for layer in row.layer_paths(backbone) for path in inside]
        return [modules[path] for path in paths if path in modules]

    def biased(self) -> tuple[str, ...]:
        """Return the paths of a layer's modules that have a bias: 4d + f + d + 2d numbers."""
        attention = (
            self.query,
            self.key,
            self.value,
            self.attention_output,
            self.attention_norm,
        )
        if "adapter" in self.lacks:  # the feed-forward block is another row's
            return attention
        return (*attention, self.intermediate, self.output, self.output_norm)
