"""Whether a run's files are those that its result vouches for, and its backbone the one it had."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unipelt_cli.backbones.pretrained import Pretrained
from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.config.recorded import RecordedExperiment
from unipelt_cli.errors import DataError, RunError
from unipelt_cli.files import atomic, sealed
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs import schema
from unipelt_cli.runs.names import ENVIRONMENT, RECORDED, RESULT


def recorded_files(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the files that a result vouches for."""
    return tuple(name for name in RECORDED if name in result["files"])


def check_seal(path: Path, value: Mapping[str, Any]) -> None:
    """Raise RunError when the object that was read from `path` is not what was sealed there."""
    if atomic.dumps(sealed.with_seal(value)) != sealed.read_text(path):
        raise RunError(f"{path}: changed since it was written", sealed.REMEDY)


def check_file(path: Path, sha256: str) -> None:
    """Raise RunError when a file of a finished run is not what was written."""
    check_digest(path, sealed.file_digest(path), sha256)


def check_digest(path: Path, actual: str, written: str) -> None:
    """Raise RunError when the sha256 of a file of a finished run is not the one written down."""
    if actual != written:
        raise RunError(
            f"{path}: changed since it was written",
            "restore it, or train the run again; for a backbone or data that moved "
            "there are --model and --source",
        )


def check_started(directory: Path, tuned: TunedModel, manifest: Mapping[str, Any]) -> None:
    """Raise RunError or DataError when backbone or rows are not those that a run started with."""
    environment = sealed.read_object(directory / ENVIRONMENT)
    if _rows_in(environment.get("data")) != _rows_in(manifest):
        raise DataError(
            f"{directory}: the rows have changed since the run started",
            "restore them, or start again with --overwrite",
        )
    started = schema.shaped(directory / ENVIRONMENT, environment, schema.Started)["backbone"]
    check_backbone(directory, started, tuned.pretrained)


def as_started(experiment: Experiment, directory: Path) -> Experiment:
    """Return a begun run's experiment with what an earlier version decided and did not record.

    Then F1 was that of the second label, and the kind of own labels was decided otherwise.
    """
    data, path = experiment.data, directory / ENVIRONMENT
    if not (data.train_file or data.dataset) or not path.is_file():
        return experiment
    manifest = sealed.read_object(path).get("data")
    if not isinstance(manifest, Mapping) or not isinstance(manifest.get("labels"), list):
        return experiment
    labels = manifest["labels"]
    changes: dict[str, str] = {}
    if data.kind == "auto":
        changes["kind"] = "classification" if labels else "regression"
    if data.positive is None and len(labels) == 2 and "positive" not in manifest:
        changes["positive"] = labels[1]
    return experiment.with_("data", **changes)


def check_same(recorded: RecordedExperiment, asked: Experiment, directory: Path) -> None:
    """Raise RunError when a directory holds another experiment; `auto` matches what it became.

    So does a default where the run was begun before there was such a setting.
    """
    old_settings, wanted = recorded.experiment.settings(), asked.settings()
    alone = {"data": {"task": "demo"}, "method": {"name": asked.method_name}}
    default = resolve([("", alone)]).settings()
    differing = [
        (section, key, old_settings[section].get(key), values.get(key))
        for section, values in wanted.items()
        for key in sorted(values.keys() | old_settings[section].keys())
        if not (section == "data" and key == "dev_size" and asked.data.folds == "auto")
        and not ((section, key) in recorded.unsaid and values.get(key) == default[section].get(key))
        and old_settings[section].get(key) != values.get(key) != "auto"
    ]
    if differing:
        section, key, old, new = differing[0]
        what = f"holds another experiment, {section}.{key} = {old!r} there, {new!r} here"
        raise RunError(f"{directory}: {what}", _how_to_go_on(differing))


def _how_to_go_on(differing: Sequence[tuple[str, str, Any, Any]]) -> str:
    """Say how a run goes on that was begun with other settings: defaults may have changed since.

    What has a flag is what a user has changed.
    """
    elsewhere = "give another --out, or replace it with --overwrite"
    if any(section == "data" or key in _FLAGS or old is None for section, key, old, _ in differing):
        return elsewhere
    words = (f"--set {section}.{key}={_as_word(old)}" for section, key, old, _ in differing)
    return f"go on as it began with {' '.join(words)}; else {elsewhere}"


_FLAGS = frozenset({"name", "backbone", "seed", "device", "precision"})


def _as_word(value: Any) -> str:
    """Write a setting as `--set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple | list) else str(value)


def without_split(
    directory: Path, result: Mapping[str, Any], split: str, others: Sequence[str]
) -> DataError:
    """Return the error for a split that a finished run has no rows of."""
    choose, folds = f"choose {', '.join(others)}", result.get("folds")
    if split == "test" and folds:
        return DataError(
            f"{directory}: no test rows, its score is that of {folds['count']} folds of its "
            f"train rows (`folds` in {RESULT})",
            "score other rows with `unipelt eval --file FILE`; --split train are those it learned",
        )
    if split == "dev":
        what = f"{directory}: no dev rows, it was trained to the end of its schedule"
        return DataError(what, f"{choose}; or train with --dev-size N")
    return DataError(f"split {split!r}: not in this run", choose)


def _rows_in(manifest: Any) -> Any:
    """Return what a manifest says of the rows themselves: notes are words, and may change."""
    if not isinstance(manifest, Mapping):
        return manifest
    if isinstance(tasks := manifest.get("tasks"), Mapping):
        return {name: _rows_in(each) for name, each in tasks.items()}
    splits = manifest.get("splits")
    digests = splits and {name: dict(split).get("digest") for name, split in splits.items()}
    return {"splits": digests, **{key: manifest.get(key) for key in ("task", "labels", "text")}}


def check_backbone(directory: Path, expected: Mapping[str, Any], backbone: Pretrained) -> None:
    """Raise RunError, with both names and the files that differ, for another backbone."""
    if backbone.fingerprint == expected["fingerprint"]:
        return
    digests, recorded = backbone.digests, expected["files"]
    differ = ", ".join(
        n for n in sorted(digests.keys() | recorded.keys()) if digests.get(n) != recorded.get(n)
    )
    raise RunError(
        f"{directory}: trained on backbone {expected['name']}{_revision(expected['revision'])} "
        f"({expected['fingerprint'][:12]}), but {backbone.name}{_revision(backbone.revision)} is "
        f"({backbone.fingerprint[:12]}): other {differ}",
        "give the backbone that the run was trained on with --model",
    )


def _revision(name: str | None) -> str:
    return f" at revision {name[:12]}" if name else ""
