"""Settings as TOML: one assignment read, a whole experiment written."""

import json
import math
import tomllib

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.config.presets import toml_reason
from unipelt_cli.config.sections import Settings
from unipelt_cli.errors import ConfigError
from unipelt_cli.files.strict import parse_toml
from unipelt_cli.text import cut, shown


def parse_assignment(text: str) -> Settings:
    """Read one `--set section.key=value`: the value is TOML, a bare word is a string."""
    target, equals, value = text.partition("=")
    section, dot, key = target.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(
            f"--set {shown(text)} is not an assignment",
            "write --set section.key=value, for example --set train.epochs=20",
        )
    word = value.strip()
    try:
        parsed = parse_toml(f"value = {word}")
    except tomllib.TOMLDecodeError:
        return {section: {key: word}}
    except (ValueError, RecursionError) as error:
        problem = f"--set {section}.{key} = {cut(word)}: {toml_reason(error)}"
        raise ConfigError(problem, "give a value of TOML, or put quotes around a text") from None
    # More keys than one: line ends made a word look like several settings.
    return {section: {key: parsed["value"] if len(parsed) == 1 else word}}


def dump(experiment: Experiment) -> str:
    """Write the experiment as TOML that `read_preset` and `resolve` give back unchanged."""
    return dump_settings(experiment.settings())


def dump_settings(settings: Settings) -> str:
    """Write sections of settings as TOML, in their order."""
    blocks = [
        "\n".join([f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())])
        for section, values in settings.items()
    ]
    return "\n\n".join(blocks) + "\n"


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # TOML's basic strings are JSON's, save that DEL must be escaped as well.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case int():
            return str(value)
        case float() if math.isfinite(value):
            return repr(value)
        case tuple() | list():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
    raise TypeError(f"no TOML for {value!r}")
