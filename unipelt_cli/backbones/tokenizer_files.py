"""Load a backbone's tokenizer from its files, those of transformers 5 too, and see what it does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unipelt_cli.backbones.file_checks import BACKEND, read_json
from unipelt_cli.errors import BackboneError
from unipelt_cli.system import imports

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
)
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_LIMIT = 100_000_000
CASED_SHARE = 0.01  # of the vocabulary; uncased ones hold a few odd letters without a small form


def load(directory: Path, config: Any) -> Any:
    """Load the fast tokenizer of a folder for the library's config object of its backbone.

    Raises BackboneError for a tokenizer that is absent, too large, damaged, slow, or not the
    backbone's.
    """
    _check_files(directory)

    def refuse(reason: str) -> BackboneError:
        return BackboneError(
            f"{directory}: the tokenizer cannot be read ({reason})",
            "save it again with save_pretrained of a fast tokenizer",
        )

    path = directory / TOKENIZER_SETTINGS[0]
    settings = read_json(path) if path.is_file() else {}
    with imports.guarded(refuse), imports.silenced():
        library = imports.transformers()
        # The newer library's plain tokenizer is all in its tokenizer.json, as this one's is.
        is_plain = settings.get("tokenizer_class") == BACKEND
        kind = library.PreTrainedTokenizerFast if is_plain else library.AutoTokenizer
        options = {} if is_plain else {"config": config, "use_fast": True}
        tokenizer = kind.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            **options,
            **_special_tokens(settings),
        )
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise BackboneError(
            f"{directory}: the tokenizer is not a fast one with a padding token",
            "save it again with save_pretrained of a fast tokenizer",
        )
    if len(tokenizer) > config.vocab_size:
        raise BackboneError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the backbone "
            f"{config.vocab_size}",
            "give the tokenizer that belongs to the backbone",
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.chat_template = None  # its names would become names of files when saved
    return tokenizer


def _check_files(directory: Path) -> None:
    files = [path for name in TOKENIZER_FILES if (path := directory / name).is_file()]
    if not files:
        raise BackboneError(
            f"{directory}: no tokenizer there", "save the tokenizer beside the backbone"
        )
    for path in files:
        if path.stat().st_size > TOKENIZER_LIMIT:
            raise BackboneError(
                f"{path}: larger than a tokenizer can be", "download or save it again"
            )


def _special_tokens(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the special tokens beside the usual ones, in the words of this version.

    Version 5 lists them as `extra_special_tokens`, and names those of one model in
    `model_specific_special_tokens`; version 4 lists them as `additional_special_tokens`, and names
    those of one model in `extra_special_tokens`.
    """
    extra = settings.get("extra_special_tokens")
    if not isinstance(extra, list):
        return {}
    listed = [*(settings.get("additional_special_tokens") or []), *extra]
    tokens = [token["content"] if isinstance(token, dict) else token for token in listed]
    return {
        "additional_special_tokens": list(dict.fromkeys(tokens)),
        "extra_special_tokens": settings.get("model_specific_special_tokens") or {},
    }


def case_note(tokenizer: Any, directory: Path, *, wants_small: bool = False) -> str | None:
    """Say where a tokenizer deals with capitals otherwise than its backbone was trained to.

    The library takes small letters for granted where a bare vocabulary says nothing else; with
    `wants_small` the backbone's own pipeline asks for small letters.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    makes_small = normalizer is not None and normalizer.normalize_str("AZ") == "az"
    if wants_small and not makes_small:
        return (
            f"{directory}: the backbone's own pipeline makes every letter a small one, which is "
            "not done here; write the texts in small letters if the backbone is to know them"
        )
    if not makes_small:
        return None
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    cased = [word for word in words if word != word.lower() and not word.startswith("[")]
    if len(cased) <= CASED_SHARE * len(words):
        return None
    return (
        f"{directory}: the tokenizer makes every letter a small one, and {len(cased):,} of the "
        f"{len(words):,} pieces of its vocabulary have capitals; if the backbone is a cased one, "
        'write {"do_lower_case": false} into its tokenizer_config.json'
    )
