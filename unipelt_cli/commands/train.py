"""The command `train`, and what it says of a run with --dry-run."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unipelt_cli.commands.shared import options
from unipelt_cli.commands.shared.data_flags import DataFlags, takes_data
from unipelt_cli.commands.shared.settings import (
    Resolved,
    flag_text,
    refuse_pairs,
    refuse_processes,
    resolve_settings,
)
from unipelt_cli.commands.shared.track_option import check_trackers
from unipelt_cli.errors import CheckError, RunError, UnipeltError
from unipelt_cli.system import processes
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal import console, tables
from unipelt_cli.terminal.command_group import print_json

if TYPE_CHECKING:
    from unipelt_cli.config.experiment import Experiment
    from unipelt_cli.training.estimate import Outlook
    from unipelt_cli.training.planning import RowCache
    from unipelt_cli.training.session import Mode


@takes_data()
def train(
    data: DataFlags,
    method: options.MethodOption = None,
    model: options.ModelOption = None,
    seed: options.SeedOption = None,
    seeds: options.SeedsOption = None,
    preset: options.PresetOption = None,
    settings: options.SettingsOption = None,
    device: options.DeviceOption = None,
    precision: options.PrecisionOption = None,
    out: options.RunOption = None,
    resume: options.ResumeOption = False,
    overwrite: options.OverwriteOption = False,
    track: options.TrackOption = None,
    dry_run: options.DryRunOption = False,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Train a method on few rows, keep the best epoch by dev, score test once.

    Example: unipelt train --train-file mine.csv --k 100 --dry-run

    Example: unipelt train --task mrpc --k 500 --data-seeds 111,222,333,444,555
    """
    flags = data.settings() | {
        "model": {"backbone": model},
        "method": {"name": method},
        "train": {"seed": seed, "device": device, "precision": precision},
    }
    trackers: list[str] = []

    def resolve() -> Resolved:
        refuse_pairs(
            ("--resume" if resume else None, "--overwrite" if overwrite else None),
            (flag_text("--data-seed", data.data_seed), flag_text("--data-seeds", data.data_seeds)),
            (flag_text("--seed", seed), flag_text("--seeds", seeds)),
        )
        if flag := flag_text("--data-seeds", data.data_seeds) or flag_text("--seeds", seeds):
            refuse_processes(flag)
        trackers.extend(check_trackers(track, offline))
        return resolve_settings([preset] if preset else [], settings, flags, offline=offline)

    resolved = processes.deferred_error(resolve)  # before accelerate imports what reads switches
    mode: Mode = "resume" if resume else "overwrite" if overwrite else "new"
    with processes.joined() as joined:
        if not joined.is_main:
            console.silence()
        grid = joined.on_each(lambda: _over_seeds(resolved().experiment, data.data_seeds, seeds))
        is_one = data.data_seeds is None and seeds is None
        directories = _directories(grid, out, is_one=is_one)
        from unipelt_cli.commands.shared import live_training
        from unipelt_cli.training.planning import RowCache

        first, shared = next(iter(grid.values())), RowCache(files=resolved().files)
        if dry_run:
            joined.on_each(lambda: show_dry_run(first, directories, mode, shared, as_json))
            return
        answer: Mapping[str, Any] | live_training.TrainedRuns
        if is_one:
            answer = live_training.train(first, directories[0], mode, joined, trackers, shared)
        else:
            answer = live_training.train_together(grid, directories, mode, trackers, shared)
    if as_json and not console.is_silenced():
        print_json(answer)
    if isinstance(answer, live_training.TrainedRuns) and (failed := answer.failed):
        raise CheckError(
            f"{len(failed)} of {len(grid)} runs failed, the first with: {failed[0].error}",
            f"see its directory {failed[0].run}; the other runs are finished",
        )


def _over_seeds(
    experiment: "Experiment", data_seeds: str | None, seeds: str | None
) -> "dict[str, Experiment]":
    """Return the experiment for each of the seeds, by what tells the runs apart."""
    with importing():
        from unipelt_cli.sweeps.grid import over_seeds
        from unipelt_cli.training.planning import with_drawn_rows

    drawn = with_drawn_rows(experiment)
    if data_seeds is None and seeds is None:
        return {"": drawn}
    return over_seeds(drawn, data_seeds, seeds)


def _directories(grid: "dict[str, Experiment]", out: Path | None, *, is_one: bool) -> list[Path]:
    """Return where each run goes: below `--out`, and there itself where it is the only one."""
    from unipelt_cli.runs.names import run_name

    if is_one and out is not None:
        return [out]
    return [(out or Path("runs")) / run_name(experiment) for experiment in grid.values()]


def show_dry_run(
    experiment: "Experiment",
    directories: Sequence[Path],
    mode: "Mode",
    shared: "RowCache",
    as_json: bool,
) -> None:
    """Say what a run would train on, what it would take and where it would be; write nothing."""
    from unipelt_cli.commands.shared import live_training
    from unipelt_cli.training import estimate

    outlook = estimate.outlook(experiment, shared)
    problem = _problem(directories[0], mode)
    manifests = [dataset.manifest for dataset in outlook.prepared]
    counts = outlook.tuned.parameter_counts()
    live_training.summarise(manifests, is_answer=True)
    tables.table(("parameters", "count"), [[n, f"{c:,}"] for n, c in counts.items()])
    _show_outlook(outlook, directories)
    notes = [*outlook.tuned.notes, *outlook.notes]
    for note in notes:
        console.say(("note: ", "yellow"), note)
    if outlook.memory.fits is False:
        console.say(
            ("warning: ", "yellow"),
            "it may not fit into memory: lower train.batch_size or model.max_length, or take a "
            "smaller --model",
        )
    if problem is not None:
        console.say(("warning: ", "yellow"), f"{problem.message}: {problem.hint}")
    if as_json and not console.is_silenced():
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
                **_costs(outlook),
                "run": str(directories[0]),
                "notes": notes,
                "problem": problem and problem.message,
                "experiment": outlook.experiment.settings(),
            }
        )


def _problem(directory: Path, mode: "Mode") -> UnipeltError | None:
    """Return why the run's directory could not be made now."""
    from unipelt_cli.runs.names import EXPERIMENT
    from unipelt_cli.runs.writer import Writer

    if mode == "resume" and (directory / EXPERIMENT).is_file():
        return None
    try:
        Writer(directory).check_without_claiming(overwrite=mode == "overwrite")
    except RunError as error:
        return error
    return None


def _costs(outlook: "Outlook") -> Mapping[str, object]:
    cost, memory = outlook.cost, outlook.memory
    return {
        "seconds": {"least": cost.least_seconds, "most": cost.most_seconds},
        "memory_bytes": memory.total,
        "free_memory_bytes": memory.free,
        "disk_bytes": cost.disk_bytes,
    }


def _show_outlook(outlook: "Outlook", directories: Sequence[Path]) -> None:
    experiment, tuned = outlook.experiment, outlook.tuned
    cost, memory = outlook.cost, outlook.memory
    times = tables.duration(cost.most_seconds)
    if outlook.experiment.data.has_dev:
        times = f"{tables.duration(cost.least_seconds)} to {times}"
    free = "" if memory.free is None else f"; {tables.size(memory.free)} are free"
    disk = shutil.disk_usage(_nearest_directory(directories[0])).free
    parts = (memory.process, memory.weights, memory.states, memory.activations)
    names = ("the process", "weights", "optimiser", "batch")
    shown = ", ".join(f"{n} {tables.size(c)}" for n, c in zip(names, parts, strict=True))
    rows = [
        ("time", times, _why(experiment)),
        ("memory", tables.size(memory.total), f"{shown}{free}"),
        ("disk", tables.size(cost.disk_bytes), f"{tables.size(disk)} are free"),
    ]
    tables.table(("a run takes", "about", ""), rows)
    several = f", the first of {len(directories)} runs" if len(directories) > 1 else ""
    console.reply(
        f"{experiment.method_name} on {experiment.model.backbone}, {tuned.pooling} pooling, "
        f"{tuned.precision} on {tuned.device.type}{several}; nothing was written"
    )
    console.reply("run: ", (str(directories[0]), "bold"))


def _why(experiment: "Experiment") -> str:
    """Say what the time is that of."""
    data, epochs = experiment.data, f"all {experiment.train.epochs} epochs"
    if data.has_dev:
        return f"as early as patience ends it, or {epochs}"
    return f"{epochs}, of {data.folds} folds and of all rows" if data.folds else epochs


def _nearest_directory(path: Path) -> Path:
    """Return the lowest directory of a path that is there."""
    folders = path.absolute(), *path.absolute().parents
    return next(folder for folder in folders if folder.is_dir())
