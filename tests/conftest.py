"""Tiny real backbones and small made-up data, made once: no network, no download."""

import hashlib
import json
import os

for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[switch] = "1"
os.environ.pop("UNIPELT_DATA", None)
# Tiny tensors gain nothing from threads, and spin when something else wants the cores.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertTokenizerFast

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.pretrained import BERT_BASE, Pretrained
from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.files import atomic, sealed
from unipelt_cli.methods import get
from unipelt_cli.models.build import count
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import Tuned
from unipelt_cli.runs.names import RECORDED, RESULT

torch.set_num_threads(1)

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


def save_backbone(directory: Path, model_type: str, **changes: object) -> Path:
    """Save a tiny random backbone of one architecture, weights N(0, 0.3), with a tokenizer."""
    layout = BACKBONES[model_type]
    sizes = OWN_SIZES.get(model_type, SIZES)
    extra = EXTRA.get(model_type, {})
    config = getattr(transformers, f"{layout.classes}Config")(**{**sizes, **extra, **changes})
    generator = torch.Generator().manual_seed(7)
    model = Pretrained("", directory, layout, {}).library_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(directory)
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    BertTokenizerFast(str(vocabulary)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a tiny backbone by model type, made on first use."""
    root = tmp_path_factory.mktemp("backbones")

    def find(model_type: str) -> Path:
        directory = root / model_type
        if directory.exists():
            return directory
        kind, changes = VARIANTS.get(model_type, (model_type, {}))
        return save_backbone(directory, kind, **changes)

    return find


def write_rows(path: Path, count: int = 60, start: int = 0) -> Path:
    """Write made-up reviews of two classes that a tiny model can learn, as CSV."""
    lines = ["text,label"]
    for row in range(start, start + count):
        word, label = (("good", "yes"), ("awful", "no"))[row % 2]
        filler = " ".join(WORDS[(row * step) % len(WORDS)] for step in range(1, 3 + row % 5))
        lines.append(f"the film {row} was {word} {filler},{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a CSV file of 60 made-up reviews, text and label."""
    return write_rows(tmp_path_factory.mktemp("data") / "reviews.csv")


SENTENCES = ["good film", "the plot was very bad but the cat sat on the red mat", "fine", "a b c"]


def experiment(backbone: Path, method: str, **sections: dict[str, Any]) -> Experiment:
    """Describe a run of a method on a tiny backbone; `options` are the method's own."""
    settings = {
        "data": {"task": "sst2"} | sections.get("data", {}),
        "model": {"backbone": str(backbone), "head_dropout": 0.0} | sections.get("model", {}),
        "method": {"name": method} | sections.get("options", {}),
        "train": {"device": "cpu", "precision": "fp32"} | sections.get("train", {}),
    }
    return resolve([("", settings)])


def disturbed(tuned: Tuned, size: float = 0.1) -> Tuned:
    """Move every trained tensor, so that what a method adds is visible."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.classifier.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(0, size, generator=generator))
    return tuned


def by_the_hooks(tuned: Tuned) -> Tuned:
    """Leave the fused layers, for comparisons to the bit with methods that have none."""
    container: Any = tuned.classifier.backbone.submodules
    container.stack.leave()
    container.stack = None
    return tuned


def logits_of(tuned: Tuned, sentences: list[str], pad_to: int | None = None) -> torch.Tensor:
    """Return the logits of sentences in one batch, padded to a length if one is given."""
    rows = encode_rows(tuned, [sentences], 128)
    with torch.no_grad():
        batch = rows.batch(range(len(sentences)), tuned.device)
        if pad_to is not None:
            batch = {
                name: torch.nn.functional.pad(tensor, (0, pad_to - tensor.shape[1]))
                for name, tensor in batch.items()
            }
        return tuned.classifier.eval()(**batch)


def bert_base_counts(name: str, head_parameters: int = 1538, **options: Any) -> tuple[int, int]:
    """Return what a method trains and stores on BERT-base, without the head."""
    settings = experiment(Path("minilm"), name, options=options) if options else None
    return count(settings.method if settings else get(name).method, BERT_BASE, head_parameters)


def reseal(directory: Path) -> None:
    """Let a changed run's result vouch for its files again: what is behind the hashes is tried."""
    path = directory / RESULT
    result = json.loads(path.read_text())
    result["files"] = {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in RECORDED
        if (directory / name).is_file()
    }
    atomic.write_json(path, sealed.with_seal(result))


SLOW = ("test_sweep.py", "test_processes.py", "test_readme.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: the last one must not run alone."""
    items.sort(key=lambda item: item.path.name not in SLOW)
