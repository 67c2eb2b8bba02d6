"""The commands before there is a run: what there is, whether it works here, what a run takes."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unipelt_cli.commands.shared import options, settings
from unipelt_cli.errors import CheckError, ConfigError, RunError, UnipeltError, nearest
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal import console, tables
from unipelt_cli.terminal.command_group import print_json

if TYPE_CHECKING:
    from unipelt_cli.config.experiment import Experiment
    from unipelt_cli.training.estimate import Outlook
    from unipelt_cli.training.execution import Mode


def list_(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="tasks, methods, presets, sweeps, backbones or runs."),
    ],
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the runs are.")] = Path(
        "runs"
    ),
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR", help="The backbone that methods are counted on. (default BERT-base)"
        ),
    ] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """List what there is to choose from, or the runs in a directory.

    Example: unipelt list methods --model minilm
    """
    if model is not None and what != "methods":
        raise ConfigError(f"--model {model!r}: only methods are counted on one", "drop --model")
    if model is not None:
        settings.settle_backbone(model, offline)
    with importing():
        from unipelt_cli.commands import listing

    if what not in listing.LISTS:
        raise ConfigError(f"list {what!r}: no such list", nearest(what, listing.LISTS))
    entries = listing.entries(what, directory, model)
    if as_json:
        print_json({what: entries})
        return
    if what == "methods":
        tables.method_table(entries, model or "BERT-base")
        return
    columns = list(entries[0]) if entries else []
    tables.table(columns, [[tables.cell(entry[c]) for c in columns] for entry in entries])
    if not entries:
        tables.say(f"no {what} in {directory}")


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A backbone to look at too: NAME, DIR or minilm."),
    ] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Check this machine and installation: what works, what is missing, and how to mend it.

    Example: unipelt doctor bert-base-uncased
    """
    from unipelt_cli.commands.doctor import examination

    found = list(examination.examine(model, offline=offline, terminal=console.terminal()))
    tables.check_table(
        [(one.what, one.ok, one.found) for one in found], [one.remedy for one in found], "-"
    )
    needed = [one for one in found if one.ok is False and one.is_needed]
    if as_json:
        print_json(
            {
                "ok": not needed,
                "checks": [
                    {"what": one.what, "ok": one.ok, "found": one.found, "remedy": one.remedy}
                    for one in found
                ],
            }
        )
    if needed:
        raise CheckError(
            f"{len(needed)} of {len(found)} checks failed that training needs, the first: "
            f"{needed[0].what}: {needed[0].found}",
            needed[0].remedy or "see above",
        )


def dry_run(
    experiment: "Experiment", directories: Sequence[Path], mode: "Mode", as_json: bool
) -> None:
    """Say what a run would train on, what it would take and where it would be; write nothing."""
    from unipelt_cli.commands.shared import live_training
    from unipelt_cli.training import estimate

    found = estimate.outlook(experiment)
    problem = _problem(directories[0], mode)
    manifests = [own.manifest for own in found.prepared]
    counts = found.tuned.parameter_counts()
    live_training.summarise(manifests)
    tables.table(("parameters", "count"), [[n, f"{c:,}"] for n, c in counts.items()])
    _show_outlook(found, directories)
    if found.memory.fits is False:
        tables.say(
            ("warning: ", "yellow"),
            "it may not fit into memory: lower train.batch_size or model.max_length, or take a "
            "smaller --model",
        )
    if problem is not None:
        tables.say(("warning: ", "yellow"), f"{problem.message}: {problem.hint}")
    if as_json and not console.is_hushed():
        described = {
            key: {
                manifest["task"]: {name: split[key] for name, split in manifest["splits"].items()}
                for manifest in manifests
            }
            for key in ("rows", "labels")
        }
        if len(manifests) == 1:
            described = {key: next(iter(each.values())) for key, each in described.items()}
        print_json(
            {
                **counts,
                **described,
                **_costs(found),
                "run": str(directories[0]),
                "problem": problem and problem.message,
                "experiment": found.experiment.settings(),
            }
        )


def _problem(directory: Path, mode: "Mode") -> UnipeltError | None:
    """Return why the run's directory could not be made now."""
    from unipelt_cli.runs import run
    from unipelt_cli.runs.writer import Writer

    if mode == "resume" and (directory / run.EXPERIMENT).is_file():
        return None
    try:
        Writer(directory).foresee(overwrite=mode == "overwrite")
    except RunError as error:
        return error
    return None


def _costs(found: "Outlook") -> dict[str, Any]:
    cost, memory = found.cost, found.memory
    return {
        "seconds": {"least": cost.least_seconds, "most": cost.most_seconds},
        "memory_bytes": memory.total,
        "free_memory_bytes": memory.free,
        "disk_bytes": cost.disk_bytes,
    }


def _show_outlook(found: "Outlook", directories: Sequence[Path]) -> None:
    experiment, tuned, cost, memory = found.experiment, found.tuned, found.cost, found.memory
    times = f"{tables.duration(cost.least_seconds)} to {tables.duration(cost.most_seconds)}"
    free = "" if memory.free is None else f"; {tables.size(memory.free)} are free"
    disk = shutil.disk_usage(_nearest_directory(directories[0])).free
    parts = (memory.process, memory.weights, memory.states, memory.activations)
    names = ("the process", "weights", "optimiser", "batch")
    shown = ", ".join(f"{n} {tables.size(c)}" for n, c in zip(names, parts, strict=True))
    rows = [
        ("time", times, f"as early as patience ends it, or all {experiment.train.epochs} epochs"),
        ("memory", tables.size(memory.total), f"{shown}{free}"),
        ("disk", tables.size(cost.disk_bytes), f"{tables.size(disk)} are free"),
    ]
    tables.table(("a run takes", "about", ""), rows)
    several = f", the first of {len(directories)} runs" if len(directories) > 1 else ""
    tables.say(
        f"{experiment.method_name} on {experiment.model.backbone}, {tuned.pooling} pooling, "
        f"{tuned.precision} on {tuned.device.type}{several}; nothing was written"
    )
    tables.say("run: ", (str(directories[0]), "bold"))


def _nearest_directory(path: Path) -> Path:
    """Return the lowest directory of a path that is there."""
    return next(own for own in (path.absolute(), *path.absolute().parents) if own.is_dir())
