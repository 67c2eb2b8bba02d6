"""The experiment that a run wrote down, read once, as the version that wrote it meant it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from unipelt_cli import methods
from unipelt_cli.config.earlier import EARLIER
from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.config.presets import parse_settings, read_content
from unipelt_cli.files import sealed


@dataclass(frozen=True)
class RecordedExperiment:
    """An experiment, and the sha256 of the bytes that it was read from."""

    experiment: Experiment
    sha256: str


def read_recorded(path: Path) -> RecordedExperiment:
    """Read the experiment file of a run; raise RunError or ConfigError where it is damaged.

    What an earlier version had no setting for is what that version did, not today's default.
    """
    content = read_content(sealed.own_file(path))
    settings = parse_settings(path, content)
    section = settings.get("method")
    if isinstance(section, dict) and section.get("name") in [*methods.table()]:
        default = methods.get(section["name"]).method
        method = {**default.earlier, **default.unwritten(section), **section}
        settings = {**settings, "method": method}
    experiment = resolve([("", EARLIER), ("", settings)])
    return RecordedExperiment(experiment, hashlib.sha256(content).hexdigest())
