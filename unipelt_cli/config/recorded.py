"""The experiment that a run wrote down, read once, as the version that wrote it meant it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unipelt_cli import methods
from unipelt_cli.config.earlier import EARLIER
from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.config.presets import parse_settings, read_content
from unipelt_cli.files import sealed


@dataclass(frozen=True)
class RecordedExperiment:
    """An experiment, the sha256 of the bytes that it was read from, and what these do not say."""

    experiment: Experiment
    sha256: str
    unsaid: frozenset[tuple[str, str]]
    """By section and key, settings that the version which wrote it did not have."""


def read_recorded(path: Path) -> RecordedExperiment:
    """Read the experiment file of a run; raise RunError or ConfigError where it is damaged.

    What an earlier version had no setting for is what that version did, not today's default.
    """
    content = read_content(sealed.own_file(path))
    settings = written = parse_settings(path, content)
    earlier: dict[str, Mapping[str, Any]] = dict(EARLIER)
    section = settings.get("method")
    if isinstance(section, dict) and section.get("name") in [*methods.table()]:
        default = methods.get(section["name"]).method
        method = {**default.earlier, **default.unwritten(section), **section}
        settings = {**settings, "method": method}
        earlier["method"] = {**default.earlier, **default.unwritten(section)}
    unsaid = frozenset(
        (name, key)
        for name, values in earlier.items()
        for key in values.keys() - written.get(name, {}).keys()
    )
    experiment = resolve([("", EARLIER), ("", settings)])
    return RecordedExperiment(experiment, hashlib.sha256(content).hexdigest(), unsaid)
