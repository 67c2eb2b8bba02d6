"""The command `recommend`: find a method and learning rate on dev, and train it."""

from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Annotated

import typer

from unipelt_cli.commands.shared import options
from unipelt_cli.commands.shared.settings import (
    command_line_settings,
    complete,
    data_flags,
    refuse_processes,
    settle,
    split_directories,
    with_columns,
)
from unipelt_cli.errors import ConfigError
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal import console, tables
from unipelt_cli.terminal.command_group import print_json

if TYPE_CHECKING:
    from unipelt_cli.config.experiment import Experiment
    from unipelt_cli.config.sections import Settings
    from unipelt_cli.sweeps.successive_halving import Candidate


def recommend(
    task: options.TaskOption = None,
    k: options.KOption = None,
    model: options.ModelOption = None,
    data_seed: options.DataSeedOption = None,
    seed: options.SeedOption = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="What to try. (default eight methods)")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(metavar="X,Y", help="Learning rates. (default the method's, a third, thrice)"),
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="90s, 10m or 1.5h, for the search and the run.")
    ] = "10m",
    settings: options.SettingsOption = None,
    source: options.SourceOption = None,
    prepared: options.PreparedOption = None,
    dev_size: options.DevSizeOption = None,
    dataset: options.DatasetOption = None,
    train_file: options.TrainFileOption = None,
    dev_file: options.DevFileOption = None,
    test_file: options.TestFileOption = None,
    encoding: options.EncodingOption = None,
    text: options.TextOption = None,
    text_pair: options.TextPairOption = None,
    label: options.LabelOption = None,
    device: options.DeviceOption = None,
    precision: options.PrecisionOption = None,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where preset, evidence and run go."),
    ] = Path("recommended"),
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Find a method and learning rate for some rows, on dev alone, and train the one chosen.

    Example: unipelt recommend --train-file mine.csv --text text --label label --budget 10m
    """
    refuse_processes("recommend")
    flags = data_flags(locals())
    flags["data"]["prepared"] = split_directories(prepared)
    flags |= {
        "model": {"backbone": model},
        "train": {"seed": seed, "device": device, "precision": precision},
    }
    with importing():
        from unipelt_cli.commands.shared import live_training
        from unipelt_cli.sweeps import successive_halving
        from unipelt_cli.sweeps.grid import split_names
    from unipelt_cli.config.experiment import merge_settings
    from unipelt_cli.files import atomic
    from unipelt_cli.terminal.console import say
    from unipelt_cli.training.planning import with_drawn_rows

    seconds = successive_halving.seconds_of(budget)
    given = merge_settings([{"data": {"folds": 0}}, command_line_settings(settings, flags)])
    own = with_columns([], given)
    settle([complete([], own)], offline)

    def base(name: str, rate: float) -> "Experiment":
        changed: Settings = {"method": {"name": name}, "train": {"learning_rate": rate}}
        return _with_dev(with_drawn_rows(complete([], merge_settings([own, changed]))))

    names = split_names("--methods", methods)
    found = successive_halving.candidates(base, names, _rates(rates))
    with atomic.new_directory(out) as directory:
        chosen = show_search(found, seconds)
        floor = successive_halving.floor_among(found)
        evidence = {
            "chosen": chosen.said(),
            "metric": chosen.metric,
            "floor": floor and floor.said(),
            "candidates": [one.said() for one in successive_halving.ranked(found)],
            "failed": [one.said() for one in found if one.error is not None],
            "budget_seconds": seconds,
        }
        atomic.write_json(directory / "evidence.json", evidence)
        atomic.write(directory / "preset.toml", successive_halving.preset(chosen).encode())
    say("preset: ", (str(out / "preset.toml"), "bold"))
    result = live_training.train(chosen.experiment, out / "run", "new")
    if as_json:
        answer = {"preset": str(out / "preset.toml"), "run": str(out / "run")}
        print_json({**answer, **evidence, "result": result})


def _with_dev(experiment: "Experiment") -> "Experiment":
    """Return the experiment; raise ConfigError where no dev rows can tell candidates apart."""
    if not experiment.data.has_dev:
        raise ConfigError(
            "data.dev_size = 0: `recommend` chooses on dev rows, and there are none",
            "give --dev-size N or --dev-file FILE; `unipelt train` needs no dev rows",
        )
    return experiment


def show_search(found: "Sequence[Candidate]", budget: float) -> "Candidate":
    """Search among candidates, show each one's turn and then all; return the best.

    A request to stop ends it at once: nothing is written yet.
    """
    from unipelt_cli.sweeps import successive_halving

    many = f"{len(found)} candidates, {tables.duration(budget)}"
    console.say(f"{many} in all: dev alone decides, test is not looked at")
    for candidate in successive_halving.search(found, budget):
        said = candidate.said()
        score = "failed" if candidate.score is None else f"{candidate.score:.4f}"
        seeds = f", {len(candidate.scores)} seeds" if len(candidate.scores) > 1 else ""
        console.say(
            f"round {candidate.rung + 1}  {candidate.name}: "
            f"{candidate.metric} {score} after epoch {said['epochs']}{seeds}"
        )
    chosen = successive_halving.best(found)
    untried = [own.name for own in found if own.score is None and own.error is None]
    if chosen.rung + 1 < len(successive_halving.RUNGS):
        left = f"; not tried: {', '.join(untried)}" if untried else ""
        ended = (
            f"the budget ended in round {chosen.rung + 1} of {len(successive_halving.RUNGS)}{left}"
        )
        console.say(("warning: ", "yellow"), ended)
    rows = []
    for candidate in successive_halving.ranked(found):
        said = candidate.said()
        spread = f" ±{stdev(candidate.scores):.4f}" if len(candidate.scores) > 1 else ""
        rows.append(
            [
                ("* " if candidate is chosen else "  ") + said["method"],
                "-" if candidate.rate is None else f"{candidate.rate:g}",
                f"{candidate.score:.4f}{spread}",
                str(len(candidate.scores)),
                str(said["epochs"]),
                f"{candidate.stored_parameters:,}",
            ]
        )
    columns = ("  method", "rate", f"dev {chosen.metric}", "seeds", "epochs", "stored")
    tables.table(columns, rows)
    if line := floor_verdict(found):
        console.say(line)
    for candidate in found:
        if candidate.error is not None:
            console.say(("failed: ", "yellow"), f"{candidate.name}: {candidate.error}")
    return chosen


def floor_verdict(found: "Sequence[Candidate]") -> str | None:
    """Say how many candidates beat the floor on dev; None where it has no score."""
    from unipelt_cli.metrics import is_better
    from unipelt_cli.sweeps import successive_halving

    floor = successive_halving.floor_among(found)
    if floor is None or floor.score is None:
        return None
    name, score = floor.experiment.method_name, floor.score
    others = [own.score for own in found if own is not floor and own.score is not None]
    better = sum(is_better(floor.metric, own, score) for own in others)
    if not better:
        return f"nothing beat {name}, which trains nothing in the backbone (dev {score:.4f})"
    return f"{better} of {len(others)} beat {name}, which trains nothing in the backbone"


def _rates(text: str | None) -> list[float]:
    from unipelt_cli.sweeps.grid import split_names

    words = split_names("--rates", text)
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ConfigError(f"--rates {text!r}: not numbers", "write it like 1e-4,5e-4") from None
