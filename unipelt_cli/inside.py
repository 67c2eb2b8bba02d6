"""The command that shows a run's gates, and what its submodules are worth."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unipelt_cli import arguments, options, render
from unipelt_cli.errors import ConfigError, RunError
from unipelt_cli.libraries import importing
from unipelt_cli.shell import print_json

if TYPE_CHECKING:
    from datasets import Dataset

    from unipelt_cli.ablation import Ablation
    from unipelt_cli.inspection import GateReport

VIEWS = ("layer", "class", "example", "epoch")


def inspect_gates(
    run: options.RunPath,
    task: options.OneTaskOption = None,
    by: Annotated[str, typer.Option(help="layer, class, example or epoch.")] = "layer",
    split: Annotated[
        str | None, typer.Option(help="test, dev or train. (default test; with --ablate dev)")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="So many of its rows, the same ones each time.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="By example: only so many rows at each end.")
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Close each submodule: which score is lost?")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw what is shown as a picture too.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page to look around in, too.")
    ] = None,
    source: options.SourceOption = None,
    device: options.DeviceOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Show how far each submodule's gate opens, and with --ablate what it is worth.

    Example: unipelt inspect-gates runs/mrpc-k500-unipelt-apl-minilm-d111-s42 --html gates.html
    """
    _check(by, top, ablate, plot, html)
    if by == "epoch":
        given = {"--task": task, "--split": split, "--rows": rows, "--html": html}
        given |= {"--source": source, "--device": device, "--model": model}
        said = ((f"--by {by}", arguments.said(flag, value)) for flag, value in given.items())
        arguments.refuse_pairs(*said)
        answer = _epochs(run, plot)
    else:
        split = split or ("dev" if ablate else "test")
        found = arguments.read_run(run, offline, source, model)
        from unipelt_cli import ablation, inspection

        if ablate:
            ablation.refuse(found)
        place = found.place(task)
        epochs = inspection.by_epoch(found) if html is not None else []
        tuned = found.build(device, model)
        chosen = inspection.sample(found.rows(split, arguments.absolute(source), place), rows)
        if ablate:
            study = ablation.Ablation(found, tuned, chosen, place)
            report = inspection.GateReport(study.gates, chosen, study.task.labels)
        else:
            study, report = None, inspection.inspect(found, tuned, chosen, place)
        view = _View(report, study, split, run.resolve().name)
        answer = view.show(by, top, found.tasks[place].text, as_json=as_json)
        if plot is not None:
            view.plot(answer, by, plot)
        if html is not None:
            from unipelt_cli import gatepage

            more = {"classes": report.by_class() if report.gates else [], "epochs": epochs}
            gatepage.write({**answer, **more}, f"gates of {run.resolve().name}", html)
            render.say("page: ", (str(html), "bold"))
    if as_json:
        print_json(answer)


def _check(by: str, top: int | None, ablate: bool, plot: Path | None, html: Path | None) -> None:
    """Raise ConfigError for flags that are wrong by themselves or beside each other."""
    if by not in VIEWS:
        raise ConfigError(f"--by {by!r}: no such view", f"choose one of {', '.join(VIEWS)}")
    if top is not None and by != "example":
        raise ConfigError(f"--top {top}: only --by example shows rows", "add --by example")
    if ablate and by != "layer":
        raise ConfigError(f"--ablate and --by {by} contradict each other", "give one of them")
    with importing():
        if plot is not None:
            from unipelt_cli import charts

            charts.check(plot)
        if html is not None:
            from unipelt_cli import gatepage

            gatepage.check(html)


def _epochs(run: Path, plot: Path | None) -> dict[str, Any]:
    """Show what training recorded; the model is not built."""
    from unipelt_cli import network

    network.settle(offline=True, needed=False)
    with importing():
        from unipelt_cli import gatecharts, gatetables, inspection, runs
    found = runs.read(run)
    epochs = inspection.by_epoch(found)
    if not epochs:
        raise RunError(
            f"{run}: its epochs hold no gates",
            "train a gated method with this version: its epochs record them",
        )
    best: list[dict[str, Any]] = next((own["layers"] for own in epochs if own["is_best"]), [])
    title = f"gates of {run.resolve().name}, mean over layers and dev rows"
    gatetables.show_epochs(epochs, found.result["metric"], title)
    if plot is not None:
        gatecharts.plot_epochs(epochs, title, plot)
        render.say("picture: ", (str(plot), "bold"))
    means = [{k: v if k == "layer" else {"mean": v} for k, v in own.items()} for own in best]
    places = range(len(found.tasks))
    return {
        "rows": sum(found.count_of("dev", place) for place in places),
        "split": "dev",
        "layers": means,
        "best_epoch": found.result["best_epoch"],
        "epochs": epochs,
    }


@dataclass(frozen=True)
class _View:
    """What was found for one split, and the ways to show it."""

    report: "GateReport"
    study: "Ablation | None"
    split: str
    name: str

    @property
    def rows(self) -> "Dataset":
        return self.report.rows

    @property
    def title(self) -> str:
        return f"gates of {self.name}, {len(self.rows)} {self.split} rows"

    def show(
        self, by: str, top: int | None, text: tuple[str, ...], *, as_json: bool
    ) -> dict[str, Any]:
        """Print a view and return it as an answer."""
        from unipelt_cli import gatetables

        report = self.report
        answer: dict[str, Any] = {
            "rows": len(self.rows),
            "split": self.split,
            "layers": report.by_layer(),
            "nearly_closed": report.nearly_closed(),
        }
        if self.study is not None:
            answer["ablation"] = self._ablate(self.study)
        elif by == "class":
            answer |= {"classes": report.by_class(), "differences": report.differences()}
            gatetables.show_classes(answer, self.split)
            gatetables.show_differences(answer["differences"])
        elif by == "example" and top is not None:
            answer["top"] = report.top(top)
            texts = {row["row"]: " | ".join(str(row[c]) for c in text) for row in self.rows}
            gatetables.show_top(answer["top"], texts)
        elif by == "example":
            answer["examples"] = report.by_example()
            if not as_json:
                for example in answer["examples"]:
                    typer.echo(json.dumps(example))
        else:
            gatetables.show_layers(answer["layers"], f"{self.title}, mean ± standard deviation")
            gatetables.show_legend(answer["nearly_closed"])
        return answer

    def _ablate(self, study: "Ablation") -> dict[str, Any]:
        from unipelt_cli import ablation, gatetables

        if self.split == "test":
            render.say(("warning: ", "yellow"), "these are test rows: choose nothing by them")
        losses = list(gatetables.tracked(study.losses(), study.passes, "closing submodules"))
        answer = ablation.summary(study, losses)
        score = f"{study.task.metric} {study.score:.4f}"
        title = f"{self.name}, {len(self.rows)} {self.split} rows, {score}"
        gatetables.show_ablation(answer, title, len(self.rows))
        return answer

    def plot(self, answer: dict[str, Any], by: str, path: Path) -> None:
        """Draw the view as a picture."""
        from unipelt_cli import gatecharts

        if "ablation" in answer:
            gatecharts.plot_ablation(answer["ablation"], self.title, path)
        elif by == "class":
            gatecharts.plot_classes(answer["classes"], self.title, path)
        else:
            gatecharts.plot_layers(answer["layers"], f"{self.title}, mean", path)
        render.say("picture: ", (str(path), "bold"))
