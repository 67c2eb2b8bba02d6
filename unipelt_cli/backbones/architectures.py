"""The table of backbones: where each architecture keeps what the submodules attach to.

A row holds module paths, the attention implementations that were tested, and what the library's
own sequence classifier of that architecture reads (the `native` pooling).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from unipelt_cli.errors import BackboneError, nearest

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
    """Implementations where a lengthened mask does not work: see `methods.attention`."""
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
        there = dict(backbone.named_modules())
        paths = list(outside)
        for row in (self, *self.more):
            inside = (*row.biased(), *row.also_biased_inside)
            paths += [f"{layer}.{path}" for layer in row.layer_paths(backbone) for path in inside]
        return [there[path] for path in paths if path in there]

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


_BERT = Layout(
    model_type="bert",
    classes="Bert",
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention="attention.self",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    intermediate="intermediate.dense",
    output="output.dense",
    output_norm="output.LayerNorm",
    embedding_norm="embeddings.LayerNorm",
    native=NativeHead(out="classifier"),
    inside="bert",
)


def _like_bert(model_type: str, classes: str, **changes: object) -> Layout:
    values = vars(_BERT) | {"model_type": model_type, "classes": classes} | changes
    return Layout(**values)


_ROBERTA_HEAD = NativeHead(out="classifier.out_proj", dense="classifier.dense")
_ROBERTA = {"native": _ROBERTA_HEAD, "inside": "roberta", "position_offset": 2}

_BART = Layout(
    model_type="bart",
    classes="Bart",
    layers="encoder.layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention="self_attn",
    attention_output="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    intermediate="fc1",
    output="fc2",
    output_norm="final_layer_norm",
    embedding_norm="encoder.layernorm_embedding",
    native=NativeHead("classification_head.out_proj", "classification_head.dense", reads_last=True),
    inside="model",
    own_attention=("eager", "sdpa"),
    is_plain=False,  # a decoder reads what the encoder makes of the same row
    also_biased=("decoder.layernorm_embedding",),
    settings={"use_cache": False},
)
_BART_DECODER = replace(_BART, layers="decoder.layers")
_BART_CROSS = replace(
    _BART_DECODER,
    query="encoder_attn.q_proj",
    key="encoder_attn.k_proj",
    value="encoder_attn.v_proj",
    attention="encoder_attn",
    attention_output="encoder_attn.out_proj",
    attention_norm="encoder_attn_layer_norm",
    gates_read="encoder_attn",
    lacks={"adapter": "no feed-forward block follows it"},
)

BACKBONES: Mapping[str, Layout] = MappingProxyType(
    {
        layout.model_type: layout
        for layout in (
            _BERT,
            _like_bert("roberta", "Roberta", **_ROBERTA),
            _like_bert("xlm-roberta", "XLMRoberta", **_ROBERTA),
            _like_bert("camembert", "Camembert", **_ROBERTA),
            _like_bert(
                "electra",
                "Electra",
                native=NativeHead("classifier.out_proj", "classifier.dense", "gelu"),
                inside="electra",
                attentions=("eager",),
            ),
            Layout(
                model_type="distilbert",
                classes="DistilBert",
                layers="transformer.layer",
                query="attention.q_lin",
                key="attention.k_lin",
                value="attention.v_lin",
                attention="attention",
                attention_output="attention.out_lin",
                attention_norm="sa_layer_norm",
                intermediate="ffn.lin1",
                output="ffn.lin2",
                output_norm="output_layer_norm",
                embedding_norm="embeddings.LayerNorm",
                native=NativeHead("classifier", "pre_classifier", "relu"),
                inside="distilbert",
                attention_added="attention.out_lin",
                output_added="ffn.dropout",
                activation="activation",
                own_attention=("eager",),
            ),
            _like_bert(
                "mpnet",
                "MPNet",
                has_plain_scores=False,
                query="attention.attn.q",
                key="attention.attn.k",
                value="attention.attn.v",
                attention="attention.attn",
                attention_output="attention.attn.o",
                attention_norm="attention.LayerNorm",
                attention_added="attention.dropout",
                native=_ROBERTA_HEAD,
                inside="mpnet",
                attentions=("eager",),
                own_attention=("eager",),
                position_offset=2,
            ),
            Layout(
                model_type="albert",
                classes="Albert",
                layers="encoder.albert_layer_groups.*.albert_layers",
                query="attention.query",
                key="attention.key",
                value="attention.value",
                attention="attention",
                attention_output="attention.dense",
                attention_norm="attention.LayerNorm",
                intermediate="ffn",
                output="ffn_output",
                output_norm="full_layer_layer_norm",
                embedding_norm="embeddings.LayerNorm",
                native=NativeHead(out="classifier"),
                inside="albert",
                is_plain=False,  # one module serves several layers
                pooler="pooler",
                also_biased=("encoder.embedding_hidden_mapping_in",),
            ),
            _like_bert(
                "deberta-v2",
                "DebertaV2",
                query="attention.self.query_proj",
                key="attention.self.key_proj",
                value="attention.self.value_proj",
                native=NativeHead("classifier", "pooler.dense", "gelu"),
                inside="deberta",
                attentions=("eager",),
                own_attention=("eager",),
                is_plain=False,  # query and key read a table of positions too
                table="disentangled_attention_bias",
                also_biased=("encoder.LayerNorm", "encoder.conv.conv", "encoder.conv.LayerNorm"),
                also_biased_inside=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
                also_read={
                    **dict.fromkeys(
                        ("conv_kernel_size", "embedding_size", "attention_head_size"), 0
                    ),
                    **{"position_buckets": -1, "share_att_key": False, "norm_rel_ebd": "none"},
                    **{"conv_act": "tanh", "conv_groups": 1, "pooler_hidden_size": 1},
                },
            ),
            Layout(
                model_type="t5",
                classes="T5",
                encoder_class="T5EncoderModel",
                layers="encoder.block",
                query="layer.0.SelfAttention.q",
                key="layer.0.SelfAttention.k",
                value="layer.0.SelfAttention.v",
                attention="layer.0.SelfAttention",
                attention_output="layer.0.SelfAttention.o",
                attention_norm="layer.0.layer_norm",
                intermediate="layer.1.DenseReluDense.wi",
                output="layer.1.DenseReluDense.wo",
                output_norm="layer.1.layer_norm",
                embedding_norm="",
                native=None,
                no_native="the library's sequence classifier reads a t5's decoder too",
                inside="",
                attentions=("eager",),
                own_attention=("eager",),
                is_plain=False,  # norms stand before the blocks, and nothing has a bias
                adapted="layer.1",
                gates_read="layer.0.SelfAttention",
                lacks={"bias": "a t5 has no biases"},
            ),
            Layout(
                model_type="modernbert",
                classes="ModernBert",
                layers="layers",
                query="attn.Wqkv",
                key="attn.Wqkv",
                value="attn.Wqkv",
                fused=True,
                attention="attn",
                attention_output="attn.Wo",
                attention_norm="mlp_norm",
                intermediate="mlp.Wi",
                output="mlp.Wo",
                output_norm="mlp_norm",
                embedding_norm="embeddings.norm",
                native=None,
                no_native="the head of the library's sequence classifier has a norm in it",
                inside="model",
                own_attention=("eager", "sdpa"),
                is_plain=False,  # norms stand before the blocks, and projections are fused
                adapted="",
                gates_read="attn",
                lacks={"bias": "a modernbert has no biases"},
                settings={"reference_compile": False},  # hooks and own forwards must be seen
            ),
            replace(_BART, more=(_BART_DECODER, _BART_CROSS)),
        )
    }
)


def get_layout(model_type: str) -> Layout:
    """Return the row for a `model_type`; raise BackboneError when the architecture is unknown."""
    if model_type not in BACKBONES:
        raise BackboneError(
            f"backbone architecture {model_type!r} is not supported", nearest(model_type, BACKBONES)
        )
    return BACKBONES[model_type]


_REFUSALS: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    (
        "position_embedding_type",
        lambda value: value not in (None, "absolute"),
        "a prefix would be silently wrong under relative positions",
    ),
    (
        "chunk_size_feed_forward",
        lambda value: bool(value),
        "a gate would see one chunk instead of the sentence",
    ),
    ("is_decoder", bool, "only encoders are supported"),
    ("add_cross_attention", bool, "only encoders are supported"),
)


def refuse_unsound(config: Mapping[str, object]) -> None:
    """Raise BackboneError for a config under which the submodules would be silently wrong."""
    for key, is_unsound, reason in _REFUSALS:
        if is_unsound(config.get(key)):
            raise BackboneError(
                f"the backbone's config has {key} = {config[key]!r}: {reason}",
                "choose another backbone; `unipelt list backbones` shows the architectures",
            )
