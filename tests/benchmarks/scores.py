"""Score contenders side by side: the same rows, the same backbone, one run at a time.

    python -m tests.benchmarks.scores --source GLUE [--contenders NAME,...] [--tasks NAME,...]
        [--csv NAME=TRAIN.csv[,TEST.csv]]... [--split dev|test] [--set SECTION.KEY=VALUE]...

Each run is kept below --out: an interrupted table goes on where it stopped. The network is not
used. SetFit takes part where it is installed (pip install setfit), or its runs are kept there.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unipelt_cli.system import network

if __name__ == "__main__":  # before the hub's libraries read their switches
    network.configure_network(offline=True, needed=False)

from tests.benchmarks.quiet import quieten
from tests.benchmarks.score_runs import Contender, Ours, Rows, find_kept, run_and_keep
from tests.benchmarks.score_table import MARK, Standing, Table
from tests.benchmarks.setfit_contender import SetFit
from unipelt_cli import methods
from unipelt_cli.config.experiment import merge_settings, resolve
from unipelt_cli.config.presets import read_preset
from unipelt_cli.config.sections import DataSettings, Settings
from unipelt_cli.config.toml import parse_assignment
from unipelt_cli.errors import ConfigError, UnipeltError
from unipelt_cli.tasks import TASKS, Glue, get_task
from unipelt_cli.terminal import comparison, console
from unipelt_cli.training.planning import RowCache

SETFIT = "setfit"
CONTENDERS = (
    *("probe", SETFIT, "full", "lora", "adapter"),
    *("unipelt-ap", "unipelt-apl", "apl-ungated"),
)
CHOSE_DEV = "; on these very dev rows {} chose their best epoch"


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", help="a directory in GLUE's layout")
    parser.add_argument("--tasks", type=_names, help="GLUE's and the demo, unless --csv is given")
    parser.add_argument("--csv", action="append", default=[], metavar="NAME=TRAIN[,TEST]")
    parser.add_argument("--contenders", type=_names, default=CONTENDERS, metavar="NAME,...")
    parser.add_argument("--against", default=methods.DEFAULT, help="whom all others are held to")
    parser.add_argument("--k", type=int, default=100, help="train rows")
    parser.add_argument("--data-seeds", type=_numbers, default=(111, 222, 333))
    parser.add_argument("--dev-size", type=int, help="dev rows to read; without it the task's own")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="what is scored")
    parser.add_argument("--model", default="minilm", help="the backbone of all contenders")
    parser.add_argument("--set", action="append", default=[], help="a setting of all runs of ours")
    parser.add_argument("--out", type=Path, default=Path("runs/scores"), help="keeps every run")
    parser.add_argument("--json", action="store_true", help="print one object on stdout")
    chosen = parser.parse_args(arguments)
    if chosen.tasks is None:
        chosen.tasks = () if chosen.csv else tuple(TASKS)
    return chosen


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def contenders_of(chosen: argparse.Namespace) -> Iterator[Contender | str]:
    """Yield the contenders; of a method that this version has not, its name."""
    given = merge_settings([parse_assignment(text) for text in chosen.set])
    last: tuple[Settings, ...] = (given, {"model": {"backbone": chosen.model}})
    for name in chosen.contenders:
        if name == SETFIT:
            yield SetFit(chosen.model)
        elif name in CONTENDERS and name not in methods.table():
            yield name
        else:
            label = Path(name).stem if Path(name).is_file() else name
            yield Ours(label, (read_preset(name), *last))


def tasks_of(chosen: argparse.Namespace) -> dict[str, Settings]:
    """Return by task the settings that name its rows, without k, seed and dev rows."""
    tasks: dict[str, Settings] = {}
    for name in chosen.tasks:
        reads_source = chosen.source and isinstance(get_task(name).source, Glue)
        tasks[name] = {"data": {"task": name} | ({"source": chosen.source} if reads_source else {})}
    for text in chosen.csv:
        name, equals, files = text.partition("=")
        train, _, test = files.partition(",")
        if not (equals and name and train) or name in tasks:
            raise ConfigError(
                f"--csv {text!r}: not NAME=TRAIN.csv with a name of its own",
                "write --csv reviews=train.csv or --csv reviews=train.csv,test.csv",
            )
        columns = {"train_file": train, "text": "text", "label": "label", "task": name}
        tasks[name] = {"data": columns | ({"test_file": test} if test else {})}
    return tasks


def draw(name: str, task: Settings, chosen: argparse.Namespace, seed: int) -> Rows:
    """Draw a task's rows for one seed; where contenders read no dev row, some are to score on."""
    data: dict[str, Any] = task["data"] | {"k": chosen.k, "data_seed": seed}
    own = TASKS[name].dev_size if "train_file" not in data else None
    scored = chosen.dev_size or own or DataSettings.model_fields["dev_size"].default
    shared = RowCache()
    (prepared,) = shared.prepare(resolve([("", {"data": data | {"dev_size": scored}})]).data)
    read = scored if chosen.dev_size is None else chosen.dev_size
    return Rows(name, seed, {"data": data | {"dev_size": read}}, prepared, shared)


def tabulate(chosen: argparse.Namespace) -> Table:
    """Run what has not been run yet, and set all of it side by side."""
    contenders, notes = list[Contender](), list[str]()
    standings = dict[str, Standing]()
    for contender in contenders_of(chosen):
        name = contender if isinstance(contender, str) else contender.name
        if name in standings:
            raise ConfigError(f"--contenders: two are called {name!r}", "rename one of the files")
        standings[name] = Standing(name, len(chosen.data_seeds))
        if isinstance(contender, str):
            notes.append(f"{name}: left out, this version has no such method")
        else:
            contenders.append(contender)
    tasks = tasks_of(chosen)
    for name, task in tasks.items():
        for seed in chosen.data_seeds:
            rows = draw(name, task, chosen, seed)
            for contender in contenders:
                note = _stand(standings[contender.name], contender, rows, chosen)
                if note is not None and note not in notes:
                    notes.append(note)
    return _table(chosen, tuple(tasks), tuple(standings.values()), notes)


def _stand(
    standing: Standing, contender: Contender, rows: Rows, chosen: argparse.Namespace
) -> str | None:
    """Take one run into a standing; return what its reader must know of it."""
    refusal = contender.refusal(rows.task)
    if refusal is not None:
        return f"{contender.name}: no {rows.task_name}, {refusal}"
    caveat = contender.caveat(rows.task)
    kept = find_kept(contender, rows, chosen.split, chosen.out)
    if kept is None and (absence := contender.absence()) is not None:
        return f"{contender.name}: left out, {absence}"
    outcome = kept or run_and_keep(contender, rows, chosen.out)
    metric = rows.task.metric
    standing.add(rows.task_name, metric, rows.seed, chosen.split, outcome)
    if caveat is not None:
        standing.marked.add(rows.task_name)
    console.say(
        f"{contender.name} {rows.task_name} {rows.seed}: "
        f"{chosen.split} {metric} {outcome.scores[chosen.split][metric]:.3f}, "
        f"{outcome.seconds:,.0f} s{', kept from before' if kept else ''}"
    )
    gc.collect()  # models are cycles, and the next one may need the room
    return None if caveat is None else f"{MARK} {contender.name}: {caveat}"


def _table(
    chosen: argparse.Namespace,
    tasks: tuple[str, ...],
    standings: tuple[Standing, ...],
    notes: list[str],
) -> Table:
    seeds = ", ".join(map(str, chosen.data_seeds))
    title = f"{chosen.split} scores, {Path(chosen.model).name}, k = {chosen.k}, data seeds {seeds}"
    selected = [own.name for own in standings if own.selected_on]
    if chosen.split == "dev" and selected:
        title += CHOSE_DEV.format(", ".join(selected))
    ranked = [own.name for own in standings if own.scores]
    against = chosen.against if chosen.against in ranked else next(iter(ranked), None)
    table = Table(title, chosen.split, tasks, standings, against)
    if ranked and table.averaged != tasks:
        notes.append(f"mean: over {', '.join(table.averaged) or 'no task'}, which all have")
    return Table(title, chosen.split, tasks, standings, against, tuple(notes))


def answer_of(table: Table) -> dict[str, Any]:
    """Return the table as one object."""
    standings = [
        asdict(own)
        | {"marked": sorted(own.marked)}
        | {
            "means": {task: own.mean([task]) for task in table.tasks},
            "mean": own.mean(table.averaged),
        }
        for own in table.standings
    ]
    return {
        "title": table.title,
        "split": table.split,
        "tasks": table.tasks,
        "averaged": table.averaged,
        "contenders": standings,
        "against": table.against,
        "differences": [asdict(distance) for distance in table.distances()],
        "notes": table.notes,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, with --json an object in its place; return the exit code."""
    chosen = options(arguments)
    try:
        table = tabulate(chosen)
    except UnipeltError as error:
        console.error(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        console.say("interrupted: the same command goes on from here")
        return 130
    with console.stdout_left_to_json(chosen.json):
        for sheet in table.sheets():
            comparison.show(sheet)
    for note in table.notes:
        console.note(note)
    if chosen.json:
        sys.stdout.write(json.dumps(answer_of(table), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    quieten()
    sys.exit(main())
