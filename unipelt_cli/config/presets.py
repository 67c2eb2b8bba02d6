"""Settings read from files: presets, grids and the experiment of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from unipelt_cli import methods
from unipelt_cli.config.sections import SECTIONS, Settings
from unipelt_cli.errors import ConfigError, nearest
from unipelt_cli.files.strict import parse_toml
from unipelt_cli.methods import recipes
from unipelt_cli.text import cut, shown

LARGEST_FILE = 1_000_000
PUBLISHED = "published/"
"""What stands before a method's name in the preset of its paper's own numbers."""
FEW_LABELS = "few-labels/"
"""What stands before it in the preset of the recipe for few labels, at the method's rate."""


def preset_folder() -> Path:
    """Return where shipped files lie: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    folder = package / "presets"
    return folder if folder.is_dir() else package.parent / "presets"


def presets() -> dict[str, Path]:
    """Return the shipped presets by name."""
    return {path.stem: path for path in sorted(preset_folder().glob("*.toml"))}


def sweep_presets() -> dict[str, Path]:
    """Return the shipped grids for `sweep` by name."""
    return {path.stem: path for path in sorted((preset_folder() / "sweeps").glob("*.toml"))}


def published_presets() -> dict[str, Settings]:
    """Return the presets of the papers' own numbers by name, as the methods' table holds them.

    Where a paper is silent it is not our recipe's defaults that count, but those of any method.
    """
    return {
        f"{PUBLISHED}{name}": _with_plain_defaults(
            {
                "method": {"name": name, **published.method},
                "train": {"learning_rate": published.learning_rate, **published.train},
            },
            recipe,
        )
        for name, recipe in methods.table().items()
        if (published := recipe.published) is not None and recipe.paper_rate is not None
    }


def recipe_settings(method: str, name: str) -> Settings:
    """Return one of a method's recipes as a layer of settings, without its learning rate.

    Raises ConfigError for a recipe that the method does not have.
    """
    entry = methods.get(method)
    if name not in (known := recipes.recipes_of(entry)):
        what = f"recipe {shown(name)}: {method} has no such recipe"
        raise ConfigError(what, f"it has {', '.join(known)}")
    if name == recipes.DEFAULT:
        return {"method": {"name": method}}
    if name == recipes.FEW:
        return _with_plain_defaults({"method": {"name": method}, **recipes.few_labels()}, entry)
    settings = published_presets()[f"{PUBLISHED}{method}"]
    train = {key: value for key, value in settings["train"].items() if key != "learning_rate"}
    return {**settings, "train": train}


def _with_plain_defaults(settings: Settings, recipe: methods.Recipe) -> Settings:
    """Put a section's own default where our recipe has another one and the paper says nothing."""
    plain = {
        section: {key: SECTIONS[section].model_fields[key].default for key in values}
        for section, values in recipe.settings.items()
    }
    return {
        section: {**plain.get(section, {}), **settings.get(section, {})}
        for section in settings.keys() | plain.keys()
    }


def read_preset(name: str) -> Settings:
    """Read a preset by path or by name; raise ConfigError when it is absent or not TOML.

    A method's name is a preset too: its defaults, where no file says more. So is its name behind
    `published/`: what its paper trains with, and behind `few-labels/`: our recipe for few labels.
    """
    if not Path(name).is_file() and name not in presets():
        if name in methods.table():
            rate = methods.get(name).learning_rate
            return {"method": {"name": name}, "train": {"learning_rate": rate}}
        if name.removeprefix(PUBLISHED) in methods.table():
            return _published(name)
        if name.removeprefix(FEW_LABELS) in methods.table():
            return _few_labels(name.removeprefix(FEW_LABELS))
    known = [*presets(), *methods.table(), *published_presets(), *few_labels_presets()]
    return read_settings(name, presets(), "unipelt list presets", known)


def few_labels_presets() -> tuple[str, ...]:
    """Return the names of the presets of the recipe for few labels: a method's that can have it."""
    return tuple(
        f"{FEW_LABELS}{name}"
        for name, recipe in methods.table().items()
        if recipes.is_for_few_labels(recipe) or recipes.FEW in recipes.recipes_of(recipe)
    )


def _few_labels(method: str) -> Settings:
    """Return the recipe for few labels with a method; of some it is their default already."""
    recipe = methods.get(method)
    name = recipes.DEFAULT if recipes.is_for_few_labels(recipe) else recipes.FEW
    settings = recipe_settings(method, name)
    rate = {"learning_rate": recipe.learning_rate}
    return {**settings, "train": {**settings.get("train", {}), **rate}}


def _published(name: str) -> Settings:
    """Return what a method's paper trains with; raise ConfigError where that cannot be run."""
    if (settings := published_presets().get(name)) is not None:
        return settings
    method = name.removeprefix(PUBLISHED)
    recipe = methods.get(method)
    why = "gives no learning rate for an encoder"
    if recipe.published is not None:
        why = f"trains with {recipe.published.optimizer}, and every run here with AdamW"
    raise ConfigError(
        f"preset {shown(name)}: {recipe.source} {why}", f"give --preset {method}: our own setting"
    )


def read_settings(
    name: str, shipped: Mapping[str, Path], listed_by: str, known: Sequence[str] = ()
) -> Settings:
    """Read a TOML file by path, or a shipped one by name.

    Raises ConfigError when it is absent, unreadable or not TOML.
    """
    path = Path(name)
    try:
        is_file = path.is_file()
    except OSError as error:
        raise _unreadable(path, error) from None
    if not is_file and name not in shipped:
        raise ConfigError(
            f"preset {shown(name)}: no such file or preset",
            nearest(name, known or [*shipped], listed_by),
        )
    path = path if is_file else shipped[name]
    return parse_settings(path, read_content(path))


def read_content(path: Path) -> bytes:
    """Read the bytes of a settings file; raise ConfigError where they cannot be."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{path}: larger than a settings file can be", "give a TOML preset")
        with path.open("rb") as file:
            return file.read(LARGEST_FILE)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: {error.strerror}", "check the path and its rights")


def parse_settings(path: Path, content: bytes) -> Settings:
    """Return what the TOML file at `path` says; raise ConfigError where it is none."""
    try:
        settings: Settings = parse_toml(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error.reason})", "save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        problem = f"{path}: not TOML ({toml_reason(error)})"
        raise ConfigError(problem, "mend the line it names") from None
    return settings


def toml_reason(error: Exception) -> str:
    """Return why a text is not TOML, short enough for a message."""
    return "nested too deeply" if isinstance(error, RecursionError) else cut(str(error))
