"""The command `recommend`: find a method, recipe, learning rate and backbone, and train it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unipelt_cli.commands.shared import options
from unipelt_cli.commands.shared.data_flags import DataFlags, takes_data
from unipelt_cli.commands.shared.settings import (
    command_line_settings,
    complete,
    refuse_pairs,
    refuse_processes,
    with_absolute_paths,
    with_columns,
)
from unipelt_cli.errors import ConfigError
from unipelt_cli.files.as_json import as_json as to_json
from unipelt_cli.runs.opening import settle_network
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal.command_group import print_json

if TYPE_CHECKING:
    from unipelt_cli.config.experiment import Experiment
    from unipelt_cli.config.sections import Settings
    from unipelt_cli.sweeps.candidates import Choice

TRIED = {
    ("train", "learning_rate"): "--rates",
    ("method", "name"): "--methods",
    ("model", "backbone"): "--models",
}
"""Settings that the search decides, and the options that say what it tries."""


@takes_data("tasks", "data_seeds")
def recommend(
    data: DataFlags,
    model: options.ModelOption = None,
    models: Annotated[
        str | None, typer.Option(metavar="A,B", help="Backbones to try. (default --model alone)")
    ] = None,
    seed: options.SeedOption = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Methods to try. (default eight)")
    ] = None,
    recipes: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="default, few-labels, published. (default all)"),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(metavar="X,Y", help="Learning rates. (default the recipe's, a third, thrice)"),
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="90s, 10m or 1.5h, for the search and the run.")
    ] = "10m",
    settings: options.SettingsOption = None,
    device: options.DeviceOption = None,
    precision: options.PrecisionOption = None,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where preset, evidence and run go."),
    ] = Path("recommended"),
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Find a method, recipe and learning rate for some rows, and train the one chosen.

    Example: unipelt recommend --train-file mine.csv --text text --label label --budget 10m
    """
    refuse_processes("recommend")
    refuse_pairs((model and "--model", models and "--models"))
    flags = data.settings() | {
        "model": {"backbone": model},
        "train": {"seed": seed, "device": device, "precision": precision},
    }
    with importing():
        from unipelt_cli.sweeps import candidates
        from unipelt_cli.sweeps.grid import split_names
    from unipelt_cli.files import atomic
    from unipelt_cli.terminal.console import note, say

    shared_settings = command_line_settings(settings, flags)
    _refuse_decided(shared_settings, has_models=models is not None)
    backbones = _backbones(models)
    words = split_names("--methods", methods), _rates(rates), split_names("--recipes", recipes)
    tried = candidates.choices(*words, backbones)
    guessed = with_columns([], shared_settings)
    experiment_of = _experiments(guessed.settings, backbones, offline)
    with importing():  # the network is settled by now: these read its switches
        from unipelt_cli.commands.shared import live_training
        from unipelt_cli.sweeps import judges, recommendation, successive_halving
        from unipelt_cli.terminal.search import show_search
        from unipelt_cli.training.planning import RowCache
    seconds = successive_halving.seconds_of(budget)
    searched = candidates.make_candidates(tried, experiment_of)
    with atomic.new_directory(out) as directory:
        shared = RowCache(files=guessed.files)
        judge = judges.judge_of(searched[0].experiment, shared)
        chosen = show_search(searched, judge, seconds)
        reuses = judges.reuses_test_rows(chosen.experiment, shared)
        known = recommendation.evidence(searched, judge, seconds, reuses_test_rows=reuses)
        evidence = to_json(known)
        atomic.write_json(directory / "evidence.json", evidence)
        atomic.write(directory / "preset.toml", recommendation.preset(chosen, judge).encode())
    say("preset: ", (str(out / "preset.toml"), "bold"))
    result = live_training.train(chosen.experiment, out / "run", "new", shared=shared)
    if reuses:
        note(
            f"the rows of this score also chose among {len(searched)} candidates: on new rows "
            "expect less"
        )
    if as_json:
        answer = {"preset": str(out / "preset.toml"), "run": str(out / "run")}
        print_json({**answer, **evidence, "result": result})


def _refuse_decided(settings: "Settings", *, has_models: bool) -> None:
    """Raise ConfigError for a setting that every candidate would overwrite."""
    for (section, key), option in TRIED.items():
        is_decided = has_models or (section, key) != ("model", "backbone")
        if is_decided and key in settings.get(section, {}):
            what = f"{section}.{key} = {settings[section][key]!r}: `recommend` decides it"
            raise ConfigError(what, f"give {option} instead, with all that it may try")


def _backbones(models: str | None) -> list[str]:
    """Read the backbones to choose among; raise ConfigError for one that is there twice."""
    from unipelt_cli.sweeps.grid import split_names

    backbones = [
        str(with_absolute_paths({"model": {"backbone": name}})["model"]["backbone"])
        for name in split_names("--models", models)
    ]
    if len(set(backbones)) < len(backbones):
        raise ConfigError(f"--models {models!r}: a backbone is there twice", "give each once")
    return backbones


def _experiments(
    settings: "Settings", backbones: Sequence[str], offline: bool
) -> "Callable[[Choice], Experiment]":
    """Settle the network for all backbones; return what makes a choice's experiment."""
    from unipelt_cli.config.experiment import merge_settings
    from unipelt_cli.config.presets import recipe_settings

    layers = [{"model": {"backbone": backbone}} for backbone in backbones] or [{}]
    planned = [complete([], merge_settings([settings, layer])) for layer in layers]
    settle_network(planned, offline=offline)
    from unipelt_cli.training.planning import with_drawn_rows  # reads the switches: settled by now

    def experiment_of(choice: "Choice") -> "Experiment":
        changed: Settings = {
            "method": {"name": choice.method},
            "train": {"learning_rate": choice.rate},
            **({} if choice.backbone is None else {"model": {"backbone": choice.backbone}}),
        }
        recipe = ("", recipe_settings(choice.method, choice.recipe))
        return with_drawn_rows(complete([recipe], merge_settings([settings, changed])))

    return experiment_of


def _rates(text: str | None) -> list[float]:
    from unipelt_cli.sweeps.grid import split_names

    words = split_names("--rates", text)
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ConfigError(f"--rates {text!r}: not numbers", "write it like 1e-4,5e-4") from None
