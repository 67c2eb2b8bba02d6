"""How a sentence encoder's own files say that a row is read: the modules behind the encoder.

sentence-transformers lists a pipeline in `modules.json` and keeps each module's settings in a
folder of its own. Until 5.3 the pooling was a switch for each mode (`pooling_mode_mean_tokens`);
since 5.4 it is one word, or a list of them (`pooling_mode`). Both are read here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from unipelt_cli.backbones.file_checks import AGAIN, read_json, read_list
from unipelt_cli.errors import BackboneError
from unipelt_cli.text import short, shown

MODULES, POOLING = "modules.json", "1_Pooling/config.json"
SETTINGS, KIND = "sentence_bert_config.json", "config_sentence_transformers.json"
COMPARED = "SentenceTransformer"  # what KIND calls it; there are CrossEncoder and SparseEncoder too
LONGEST = 100  # letters of a path inside the folder
CHOOSE = "choose the pooling yourself: --set model.pooling=mean, cls or eos"

_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_OURS = {"mean": "mean", "cls": "cls", "lasttoken": "eos"}
# A head that trains finds its own scale, and dropout does nothing to a finished encoder; the others
# hold numbers that were trained, which are left out with a word.
_LEFT_OUT_SILENTLY, _LEFT_OUT = ("Normalize", "Dropout"), ("Dense", "LayerNorm")


@dataclass(frozen=True)
class Reading:
    """What a folder says of how its encoder's rows are read."""

    pooling: str | None = None
    """mean, cls or eos, in our words; None where the folder names none."""
    file: str | None = None
    """The file that names it, relative to the folder."""
    left_out: tuple[str, ...] = ()
    """Modules behind the pooling, which are not computed here."""

    lower_cases: bool = False
    """Whether texts are to be in small letters, whatever the tokenizer does."""
    compares: bool = False
    """Whether it makes one vector of a text, to be compared with those of others."""

    @property
    def note(self) -> str | None:
        """Return what a user must know of the modules that are left out."""
        trained = [kind for kind in self.left_out if kind in _LEFT_OUT]
        if not trained:
            return None
        return (
            f"the backbone's own pipeline goes on with {' and '.join(trained)} after its "
            f"{self.pooling} pooling; that is left out, and the head reads what was pooled"
        )


@dataclass(frozen=True)
class _Module:
    kind: str
    folder: str


def read(directory: Path) -> Reading:
    """Read how an encoder's folder, or the pipeline that it is a part of, reads its rows.

    Raises BackboneError for a mode or a module that cannot be followed, and for damaged files.
    """
    root = _root(directory)
    if not (root / MODULES).is_file():
        path = root / POOLING
        if not path.is_file():
            return Reading()
        return Reading(_mode(path), POOLING, compares=_compares(root))
    modules = _modules(root / MODULES)
    kinds = [module.kind for module in modules]
    if kinds == ["Transformer"]:
        return Reading()
    behind = kinds[2:]
    odd = [kind for kind in behind if kind not in (*_LEFT_OUT_SILENTLY, *_LEFT_OUT)]
    if kinds[:2] != ["Transformer", "Pooling"] or odd:
        listed = ", ".join(kinds) or "no module"
        raise BackboneError(f"{root / MODULES}: a pipeline of {listed} cannot be followed", CHOOSE)
    settings = _settings(root / modules[0].folder / SETTINGS)
    file = str(PurePosixPath(modules[1].folder) / "config.json")
    if not (root / file).is_file():
        raise BackboneError(f"{root / MODULES}: names {file}, which is not there", CHOOSE)
    lower_cases = settings.get("do_lower_case") is True
    return Reading(_mode(root / file), file, tuple(behind), lower_cases, _compares(root))


def _compares(root: Path) -> bool:
    """Say whether a pipeline that pools is one for comparing vectors: older ones do not say."""
    path = root / KIND
    kind = read_json(path).get("model_type") if path.is_file() else None
    return kind in (None, COMPARED)


def encoder_folder(directory: Path) -> Path:
    """Return the folder of the encoder itself: older pipelines keep it in one of their own."""
    if (directory / "config.json").is_file() or not (directory / MODULES).is_file():
        return directory
    folders = [m.folder for m in _modules(directory / MODULES) if m.kind == "Transformer"]
    return directory / folders[0] if folders else directory


def _root(directory: Path) -> Path:
    """Return the folder of the pipeline: the encoder's own, or the one around it that names it."""
    around = directory.absolute().parent
    if (directory / MODULES).is_file() or not (around / MODULES).is_file():
        return directory
    folders = [m.folder for m in _modules(around / MODULES) if m.kind == "Transformer"]
    return around if directory.absolute().name in folders else directory


def _modules(path: Path) -> list[_Module]:
    """Return the modules that a pipeline lists, in its order."""
    return [_module(entry, path) for entry in read_list(path)]


def _module(entry: Any, path: Path) -> _Module:
    kind, folder = (entry.get(key) if isinstance(entry, dict) else None for key in ("type", "path"))
    if not isinstance(kind, str) or not isinstance(folder, str):
        raise BackboneError(f"{path}: {shown(entry)} is not a module with a type and a path", AGAIN)
    parts = PurePosixPath(folder)
    is_inside = not parts.is_absolute() and ".." not in parts.parts and "\\" not in folder
    if not is_inside or not folder.isprintable() or len(folder) > LONGEST:
        raise BackboneError(f"{path}: the path {short(folder)} is none inside the folder", AGAIN)
    name = kind.rpartition(".")[2]
    return _Module(name if kind.startswith("sentence_transformers.") else short(kind), folder)


def _settings(path: Path) -> Mapping[str, Any]:
    """Return an encoder's settings in its pipeline.

    Raises BackboneError where the pooling reads another output than the last hidden states.
    """
    if not path.is_file():
        return {}
    settings = read_json(path)
    modality = settings.get("modality_config")
    text = modality.get("text") if isinstance(modality, dict) else None
    output = text.get("method_output_name") if isinstance(text, dict) else None
    if output not in (None, "last_hidden_state"):
        raise BackboneError(
            f"{path}: the pooling reads {shown(output)}, and only last_hidden_state is supported",
            CHOOSE,
        )
    return settings


def _mode(path: Path) -> str:
    """Return the pooling that a pooling module's settings name, in our words."""
    settings = read_json(path)
    words, switched = _words(settings, path), list(_switched(settings, path))
    if words and switched and set(words) != set(switched):
        raise BackboneError(
            f"{path}: pooling_mode says {_listed(words)}, the switches {_listed(switched)}", CHOOSE
        )
    modes = words or switched
    if not modes:
        raise BackboneError(f"{path}: names no pooling", CHOOSE)
    if len(modes) > 1:
        raise BackboneError(
            f"{path}: {_listed(modes)} pooling side by side is not supported", CHOOSE
        )
    if modes[0] not in _OURS:
        raise BackboneError(f"{path}: {short(modes[0])} pooling is not supported", CHOOSE)
    return _OURS[modes[0]]


def _words(settings: Mapping[str, Any], path: Path) -> list[str]:
    value = settings.get("pooling_mode")
    words = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(word, str) for word in words):
        raise BackboneError(f"{path}: pooling_mode = {shown(value)} is not a mode's name", CHOOSE)
    return words


def _switched(settings: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Yield the modes that are switched on; one that nobody knows is yielded by its key."""
    for key, value in settings.items():
        if key.startswith("pooling_mode_"):
            if not isinstance(value, bool):
                raise BackboneError(f"{path}: {key} = {shown(value)} is not true or false", CHOOSE)
            if value:
                yield _SWITCHES.get(key, key)


def _listed(modes: Sequence[str]) -> str:
    return " and ".join(map(short, modes))
