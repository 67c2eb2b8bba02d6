"""Tiny real backbones of every architecture, with random weights and a tokenizer of few words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertTokenizerFast

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.pretrained import Pretrained

Backbones = Callable[[str], Path]
"""From a model type to the directory of a tiny backbone of it."""
WORDS = [
    "good",
    "bad",
    "film",
    "plot",
    "fine",
    "poor",
    "great",
    "awful",
    "the",
    "a",
    "is",
    "was",
    "very",
    "not",
    "quite",
    "so",
    "but",
    "and",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "hill",
    "red",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 140,
    "pad_token_id": 0,
}
DISTILBERT_SIZES = {
    "vocab_size": 100,
    "dim": 32,
    "n_heads": 4,
    "n_layers": 2,
    "hidden_dim": 64,
    "max_position_embeddings": 140,
    "pad_token_id": 0,
}
T5_SIZES = {
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
}
BART_SIZES = {
    "vocab_size": 100,
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    "max_position_embeddings": 140,
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 2),
    "eos_token_id": 3,
}
OWN_SIZES = {"bart": BART_SIZES, "distilbert": DISTILBERT_SIZES, "t5": T5_SIZES}
EXTRA: dict[str, dict[str, object]] = {
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 16, "num_hidden_layers": 3},
    # A global and a local layer, and a window smaller than the sentences.
    "modernbert": {
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        **dict.fromkeys(("bos_token_id", "cls_token_id"), 2),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 3),
    },
    # As every version 3; twice the buckets is a length that tests pad to.
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 64,
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu", "d_kv": 6}),
    "deberta-v2-separate": ("deberta-v2", {"share_att_key": False, "conv_kernel_size": 3}),
    "deberta-v2-absolute": (
        "deberta-v2",
        {"relative_attention": False, "position_biased_input": True, "type_vocab_size": 2},
    ),
}
"""Backbones that are an architecture with other settings, by a name for tests."""


KINDS = {**BACKBONES, **{name: BACKBONES[kind] for name, (kind, _) in VARIANTS.items()}}


def planned_backbone(model_type: str, **changes: object) -> Pretrained:
    """Return a tiny backbone of one architecture of which there is no file yet."""
    sizes = {**OWN_SIZES.get(model_type, SIZES), **EXTRA.get(model_type, {}), **changes}
    return Pretrained(model_type, Path(), BACKBONES[model_type], sizes)


def save_backbone(directory: Path, model_type: str, **changes: object) -> Path:
    """Save a tiny random backbone of one architecture, weights N(0, 0.3), with a tokenizer."""
    planned = planned_backbone(model_type, **changes)
    config = getattr(transformers, f"{planned.layout.classes}Config")(**planned.config)
    generator = torch.Generator().manual_seed(7)
    model = planned.library_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(directory)
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    BertTokenizerFast(str(vocabulary)).save_pretrained(directory)
    return directory


HIDDEN, LAYERS = 32, 2
OLD, NEW = "sentence_transformers.models", "sentence_transformers.sentence_transformer.modules"
"""Where sentence-transformers keeps its modules, until version 5.3 and from 5.4 on."""


def save_pipeline(
    directory: Path,
    pooling: dict[str, Any] | None,
    behind: tuple[str, ...] = (),
    prefix: str = NEW,
    encoder: str = "",
) -> Path:
    """Make a folder a pipeline: encoder, pooling, and modules behind it."""
    kinds = ["Transformer", *(["Pooling"] if pooling is not None else []), *behind]
    modules = []
    for place, kind in enumerate(kinds):
        module = kind.lower() if prefix == NEW else ""
        full = ".".join(filter(None, (prefix, module, kind)))
        path = encoder if place == 0 else f"{place}_{kind}"
        modules.append({"idx": place, "name": str(place), "path": path, "type": full})
    (directory / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory
