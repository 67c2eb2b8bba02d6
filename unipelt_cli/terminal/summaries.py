"""What is said of rows, results and runs when they are there."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from unipelt_cli.terminal.console import answers, console, reply, say
from unipelt_cli.terminal.tables import table
from unipelt_cli.text import plain, rates, shown_score

if TYPE_CHECKING:
    from unipelt_cli.gates.results import StaticReport

GAP = 2
MOST_LABELS = 24
WIDE = 100  # columns, from which on a table of methods shows rates
RATES = ("learning_rate", "paper_rate", "paper_optimizer")


def method_table(entries: Sequence[Mapping[str, Any]], backbone: str) -> None:
    """Print the methods by category, with what they train and store on a backbone.

    Rates stand in terminals that have room for them, and in the JSON.
    """
    view, has_rates = Table(box=None, pad_edge=False), answers().width >= WIDE
    view.add_column("method", no_wrap=True)
    view.add_column("trainable", justify="right", no_wrap=True)
    view.add_column("stored", justify="right", no_wrap=True)
    view.add_column("merges")
    if has_rates:
        view.add_column("rate (paper)", no_wrap=True)
    view.add_column("paper")
    category = None
    for entry in entries:
        if entry["category"] != category:
            category = entry["category"]
            view.add_row(Text(category, style="bold"))
        numbers = [
            "-" if entry[key] is None else f"{entry[key]:,}" for key in ("trainable", "stored")
        ]
        merges = "yes" if entry["mergeable"] else "no"
        rate = [rates(*(entry[key] for key in RATES))] if has_rates else []
        view.add_row(Text(f"  {entry['name']}"), *numbers, merges, *rate, Text(entry["paper"]))
    answers().print(view)
    reply(f"counted on {backbone}, the head apart; - where it cannot carry the method")


def data_summary(manifest: Mapping[str, Any], *, is_answer: bool) -> None:
    """Print the splits: rows, labels, lengths, and what was noticed about them."""
    out = answers() if is_answer else console()
    columns, rows, counts = ("split", "rows", "words", "max"), [], []
    for name, split in manifest["splits"].items():
        words = split["words"]
        rows.append([name, str(split["rows"]), str(words["p50"]), str(words["max"])])
        counts.append(_counted(split["labels"]))
    used = sum(max(map(len, column)) + GAP for column in zip(columns, *rows, strict=True))
    room = out.width - used
    shown = [[*row, _packed(counted, room)] for row, counted in zip(rows, counts, strict=True)]
    table((*columns, "labels"), shown, out)
    for note in (*manifest["notes"], *_repeated(manifest)):
        say(("note: ", "yellow"), note)


def _counted(labels: Mapping[str, float]) -> list[str]:
    """Write labels with their counts, of many only the first ones and how many more there are."""
    first = list(labels.items())[: MOST_LABELS if len(labels) > MOST_LABELS + 1 else None]
    words = [f"{plain(label)} {_short(count)}" for label, count in first]
    left = len(labels) - len(first)
    return [*words, f"and {left} more labels"] if left else words


def _packed(words: Sequence[str], room: int) -> Text:
    """Put words on lines: each one whole, where it is not longer than a line."""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}{' ' * GAP if lines[-1] else ''}{word}"
        if lines[-1] and cell_len(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return Text("\n".join(lines))


def _repeated(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Say, where there are any, which texts the splits hold twice or with several labels."""
    within = ((f"within {name}", split["duplicates"]) for name, split in manifest["splits"].items())
    shared = ((pair.replace("_", " and "), count) for pair, count in manifest["leakage"].items())
    repeated = [f"{count} {where}" for where, count in (*within, *shared) if count]
    if repeated:
        yield f"rows with equal texts: {', '.join(repeated)}"
    if manifest["conflicts"]:
        yield f"texts with more than one label: {manifest['conflicts']}"


def _short(count: float) -> str:
    return str(count) if isinstance(count, int) else f"{count:.2f}"


def result_summary(result: Mapping[str, Any], directory: Path) -> None:
    """Print what a finished run reached and what it costs to keep."""
    if result.get("folds"):
        _folds_table(result)
    positive = result.get("positive")
    names = {"dev": "dev", "test": _tested(result)}
    rows = [
        [name, "  ".join(f"{shown_score(n, positive)} {v:.4f}" for n, v in result[split].items())]
        for split, name in names.items()
        if result[split]
    ]
    table(("split", "scores"), rows)
    if between := result.get("interval"):
        metric = shown_score(result["metric"], result.get("positive"))
        reply(f"95 % interval of {metric}, rows drawn anew: {between[0]:.4f} to {between[1]:.4f}")
    if result["dev"]:
        ended = f"best epoch {result['best_epoch']} of {result['epochs']}"
    else:
        ended = f"trained to the end of its schedule, epoch {result['epochs']}"
    reply(
        f"{ended}, {result['seconds']:.0f} s, ",
        f"{result['stored_parameters'] + result['head_parameters']:,} numbers stored ",
        f"({result['artifact_bytes'] / 1e6:.2f} MB)",
    )
    _floor_line(result)
    if result["collapsed"]:
        say(("warning: ", "yellow"), "the run predicts the same for every test row: it collapsed")
    warn_of_mean(_tested_rows(result), result.get("against_mean", {}))
    say("run: ", (str(directory), "bold"))


def _tested(result: Mapping[str, Any]) -> str:
    """Say, before a score, what it is of."""
    folds = result.get("folds")
    return f"{folds['count']} folds" if folds else "test"


def _tested_rows(result: Mapping[str, Any]) -> str:
    """Say, in a sentence, on which rows a run was scored."""
    return "the folds" if result.get("folds") else "test"


def _floor_line(result: Mapping[str, Any]) -> None:
    """Say what the floor of all methods gives on the run's rows, or why that is not known."""
    from unipelt_cli.methods import FLOOR  # which imports torch: help does not wait for it

    if reason := result.get(f"no_{FLOOR}"):
        reply(f"{FLOOR} on the same rows: left out, {reason}")
    if scores := result.get(FLOOR):
        metric = result["metric"]
        name = shown_score(metric, result.get("positive"))
        words = {"test": _tested(result)}
        shown = ", ".join(
            f"{words.get(split, split)} {name} {values[metric]:.4f}"
            for split, values in scores.items()
        )
        reply(f"{FLOOR} on the same rows: {shown}")


def _folds_table(result: Mapping[str, Any]) -> None:
    """Print each fold's rows and scores, and their mean and spread."""
    folds, positive = result["folds"], result.get("positive")
    names = list(folds["mean"])
    rows = [
        [str(number), str(fold["rows"]), *(f"{fold['test'][name]:.4f}" for name in names)]
        for number, fold in enumerate(folds["each"], 1)
    ]
    spread = [f"{folds['mean'][name]:.4f} ±{folds['spread'][name]:.4f}" for name in names]
    rows.append(["mean", "", *spread])
    table(("fold", "rows", *(shown_score(name, positive) for name in names)), rows)


def warn_of_mean(rows: str, against_mean: Mapping[str, Mapping[str, float]]) -> None:
    """Warn of regressions whose error is no lower than that of saying the train rows' mean."""
    from unipelt_cli.metrics import loses_to_mean  # which imports numpy: help does not wait for it

    for task, error in against_mean.items():
        if loses_to_mean(error):
            say(
                ("warning: ", "yellow"),
                f"{task}: the squared error on {rows}, {error['mse']:.4g}, is not below that of "
                f"always saying the train rows' mean, {error['mse_of_mean']:.4g}",
            )


def runs_summary(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what several finished runs reached, one line each under its label, and their mean."""
    first = next(iter(results.values()))
    shown = [("test", name) for name in first["test"]]
    if all(result["dev"] for result in results.values()):
        shown.insert(0, ("dev", first["metric"]))
    positive = first.get("positive")
    words = {"dev": "dev", "test": _tested(first)}
    columns = ("run", *(f"{words[split]} {shown_score(name, positive)}" for split, name in shown))
    scores = {
        label: [result[split][name] for split, name in shown] for label, result in results.items()
    }
    rows = [[label, *(f"{value:.4f}" for value in values)] for label, values in scores.items()]
    if len(rows) > 1:
        spread = [
            f"{mean(values):.4f} ±{stdev(values):.4f}"
            for values in zip(*scores.values(), strict=True)
        ]
        rows.append(["mean", *spread])
    table(columns, rows)
    _floor_means(list(results.values()))
    for label, result in results.items():
        if result["collapsed"]:
            say(("warning: ", "yellow"), f"{label} predicts the same for every test row")
        errors = result.get("against_mean", {})
        warn_of_mean(
            _tested_rows(result), {f"{label}, {task}": against for task, against in errors.items()}
        )


def _floor_means(results: Sequence[Mapping[str, Any]]) -> None:
    """Say what the floor gives on the same rows, on average over runs that all know it."""
    from unipelt_cli.methods import FLOOR

    if all(FLOOR in result for result in results):
        metric = results[0]["metric"]
        score = mean(result[FLOOR]["test"][metric] for result in results)
        name = shown_score(metric, results[0].get("positive"))
        reply(f"{FLOOR} on the same rows: {_tested(results[0])} {name} {score:.4f}, the mean")


def static_summary(report: "StaticReport") -> None:
    """Print what constant gates and dropped submodules cost, and what they gain."""
    changes = [
        (f"dev {report.metric}", report.dev, ".4f"),
        (f"test {report.metric}", report.test, ".4f"),
        ("numbers stored", report.stored_parameters, ",.0f"),
        ("rows/s", report.rows_per_second, ",.0f"),
    ]
    rows = [
        [name, f"{change.before:{form}}", f"{change.after:{form}}"]
        for name, change, form in changes
    ]
    table(("constant gates", "before", "after"), rows)
    dropped = ", ".join(report.dropped) or "nothing"
    reply(f"dropped: {dropped}")
