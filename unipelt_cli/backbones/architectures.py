"""The table of architectures: where each has what methods attach to."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from unipelt_cli.backbones.layout import Layout, NativeHead
from unipelt_cli.errors import BackboneError, nearest

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
