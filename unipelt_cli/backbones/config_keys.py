"""Which keys of a config.json decide what an encoder computes, across generations of the library.

A key is one of four things: a setting that this version's config class takes; one that a newer
version writes in its place, translated here exactly; bookkeeping, listed here; or unknown. What is
unknown is refused by name unless it is empty or says what the config says anyway: left out, it
would make the same weights compute something else.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.errors import BackboneError
from unipelt_cli.text import shown

SAVED = "give a config.json that was saved with the weights"
NEWER = "choose another backbone: this one needs a newer generation of the library"
UNKNOWN = "choose another backbone, or remove the key if the encoder computes the same without it"

_ABOUT_THE_FILE = """
    _attn_implementation_autoset _commit_hash _name_or_path _num_labels adapter_transformers_version
    architectures base_model base_model_name dataset datasets description dtype language languages
    library_name license model_name model_type name name_or_path sentence_transformers tags
    tokenizer tokenizer_class torch_dtype transformers_version transformers.js_config version
"""
_ABOUT_A_HEAD = """
    activation_fn classifier_activation classifier_dropout_prob classifier_pooling cls_dropout
    finetuning_task
    fit_intercept id2label label2id label_smoothing loss_fct loss_type matryoshka_dimensions
    num_choices num_labels problem_type regression sbert_ce_default_activation_function
    sentence_transformers_version task_specific_params
"""
_ABOUT_TRAINING = """
    gradient_checkpointing initializer_factor initializer_range seed tf_legacy_loss xla_device
"""
_ABOUT_OUTPUT = """
    _output_attentions keys_to_ignore_at_inference output_attentions output_hidden_states
    output_past output_scores return_dict return_dict_in_generate torchscript use_bfloat16 use_cache
"""
_ABOUT_GENERATION = """
    bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty force_bos_token_to_be_generated forced_bos_token_id
    forced_eos_token_id is_encoder_decoder length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences prefix
    remove_invalid_values repetition_penalty suppress_tokens temperature tie_encoder_decoder top_k
    top_p typical_p
"""
_ABOUT_TOKENS = """
    do_lower_case mask_token_id max_seq_length model_max_length padding_side truncation_side
    unk_token_id
"""
# Of heads that are gone the weights have the shape already: others are refused where they are read.
_ABOUT_SHAPES = "pruned_heads"
HARMLESS = frozenset(
    f"{_ABOUT_THE_FILE} {_ABOUT_A_HEAD} {_ABOUT_TRAINING} {_ABOUT_OUTPUT} {_ABOUT_GENERATION} "
    f"{_ABOUT_TOKENS} {_ABOUT_SHAPES}".split()
)
"""Bookkeeping of any architecture: nothing that an encoder computes depends on it."""

_ANY = object()
_POOLER_OF_BERT = (
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)
_UNREAD: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "bert": dict.fromkeys(_POOLER_OF_BERT, _ANY),
        "distilbert": {"tie_weights_": _ANY},
        "albert": {
            **dict.fromkeys(("down_scale_factor", "gap_size", "net_structure_type"), _ANY),
            "num_memory_blocks": _ANY,
        },
        "t5": dict.fromkeys(("n_positions", "scale_decoder_outputs"), _ANY),
        "modernbert": {
            "layer_norm_eps": _ANY,  # the library reads norm_eps
            "causal_mask": False,
        },
        "bart": {
            **dict.fromkeys(("classif_dropout", "add_bias_logits"), _ANY),
            **dict.fromkeys(("add_final_layer_norm", "normalize_before"), False),
            **{"normalize_embedding": True, "static_position_embeddings": False},
            "extra_pos_embeddings": 2,
        },
    }
)
"""Keys that the library never reads for an architecture, with the one value that it computes."""

_WHOLE_THETA = 160000.0  # the library's default
_WHOLE, _SLIDING = "full_attention", "sliding_attention"


def translate(config: Mapping[str, Any], layout: Layout, path: Path) -> Mapping[str, Any]:
    """Return a config with what transformers 5 writes said in the words of version 4.

    Raises BackboneError for what version 4 cannot compute, and for keys that contradict each other.
    """
    translated = dict(config)
    if layout.model_type == "modernbert":
        _translate_positions(translated, path)
        _translate_layers(translated, path)
    return translated


def _translate_positions(config: dict[str, Any], path: Path) -> None:
    """Turn `rope_parameters` into the two bases of the rotation angles.

    A base that is null is the other's, as in the library: it must not become the default.
    """
    parameters = config.pop("rope_parameters", None)
    names = {_WHOLE: "global_rope_theta", _SLIDING: "local_rope_theta"}
    if parameters is not None:
        if not isinstance(parameters, dict) or not parameters.keys() <= names.keys():
            _refuse("rope_parameters", parameters, path, NEWER)
        for kind, name in names.items():
            theta = _theta(f"rope_parameters.{kind}", parameters.get(kind), path)
            if theta is not None and config.get(name) not in (None, theta):
                _contradict(f"rope_parameters.{kind}", name, path)
            if theta is not None:
                config[name] = theta
    if config.get("local_rope_theta", 0) is None:
        config["local_rope_theta"] = config.get("global_rope_theta") or _WHOLE_THETA


def _theta(key: str, parameters: Any, path: Path) -> object:
    """Return the base of plain rotary positions; any other kind of them is refused."""
    if parameters is None:
        return None
    if not isinstance(parameters, dict):
        _refuse(key, parameters, path, NEWER)
    plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    for name, value in parameters.items():
        if name != "rope_theta" and value is not None and value != plain.get(name):
            _refuse(f"{key}.{name}", value, path, NEWER)
    theta = parameters.get("rope_theta")
    if theta is not None and (problem := theta_problem(theta)):
        raise BackboneError(f"{path}: {key}.rope_theta = {shown(theta)} is not {problem}", SAVED)
    return theta


def theta_problem(value: object) -> str | None:
    """Say what the base of rotary positions should be, where it is not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "a number above 1"
    return None if 1 < value < math.inf else "a number above 1"


def _translate_layers(config: dict[str, Any], path: Path) -> None:
    """Turn `layer_types` into how often a layer attends to all tokens, which version 4 counts."""
    kinds, name = config.pop("layer_types", None), "global_attn_every_n_layers"
    if kinds is None:
        return
    count = config.get("num_hidden_layers", 22)
    if not isinstance(kinds, list) or len(kinds) != count:
        _refuse("layer_types", kinds, path, NEWER)

    def fits(every: object) -> bool:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            return False
        return kinds == [_SLIDING if layer % every else _WHOLE for layer in range(len(kinds))]

    if config.get(name) is not None:
        if not fits(config[name]):
            _contradict("layer_types", name, path)
        return
    every = next(filter(fits, range(1, len(kinds) + 1)), None)
    if every is None:
        _refuse("layer_types", kinds, path, NEWER)
    config[name] = every


def refuse_unread(
    config: Mapping[str, Any], read: Mapping[str, Any], library: Any, layout: Layout, path: Path
) -> None:
    """Raise BackboneError for a key that is not `read`, and might change what is computed.

    `library` is the config object that the library made of the keys that are read.
    """
    unread = _UNREAD.get(layout.model_type, {})
    for key, value in config.items():
        if key in read or key in HARMLESS or _is_empty(value):
            continue
        if unread.get(key) is _ANY or (key in unread and _same(unread[key], value)):
            continue
        if not _same(getattr(library, key, _ANY), value):
            _refuse(key, value, path, UNKNOWN)


def _is_empty(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_empty, value.values()))
    return value is None or value in ([], "")


def _same(ours: object, value: object) -> bool:
    """Say whether two values are the same setting: false and 0 are not."""
    return isinstance(ours, bool) == isinstance(value, bool) and ours == value


def _contradict(key: str, other: str, path: Path) -> NoReturn:
    raise BackboneError(f"{path}: {key} and {other} contradict each other", SAVED)


def _refuse(key: str, value: object, path: Path, hint: str) -> NoReturn:
    raise BackboneError(f"{path}: {key} = {shown(value)} is not computed here", hint)
