"""The command `inspect-gates`: which submodules a run really used."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unipelt_cli.commands.shared import options, run_argument, settings
from unipelt_cli.errors import ConfigError, RunError
from unipelt_cli.files.as_json import as_json as to_json
from unipelt_cli.runs.opening import open_run
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal import console
from unipelt_cli.terminal.command_group import print_json

if TYPE_CHECKING:
    from datasets import Dataset

    from unipelt_cli.gates.ablation import Ablation
    from unipelt_cli.gates.report import GateReport
    from unipelt_cli.gates.results import AblationReport, EpochsInspection, Inspection

VIEWS = ("layer", "class", "example", "epoch")


def inspect_gates(
    run: options.RunPath,
    task: options.OneTaskOption = None,
    by: Annotated[str, typer.Option(help="layer, class, example or epoch.")] = "layer",
    split: Annotated[
        str | None,
        typer.Option(help="test, dev or train. (default test; with --ablate dev)"),
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
        flags = {"--task": task, "--split": split, "--rows": rows, "--html": html}
        flags |= {"--source": source, "--device": device, "--model": model}
        pairs = ((f"--by {by}", settings.flag_text(flag, value)) for flag, value in flags.items())
        settings.refuse_pairs(*pairs)
        answer: Inspection | EpochsInspection = _epochs(run, plot)
    else:
        opened = open_run(
            run_argument.locate(run, offline), offline=offline, source=source, model=model
        )
        wanted = "dev" if ablate else "test"
        split = split or (wanted if wanted in opened.splits else "train")
        from unipelt_cli.gates import ablation
        from unipelt_cli.gates.report import GateReport, by_epoch, inspect_gates, sample

        if ablate:
            ablation.refuse(opened)
        task_index = opened.task_index(task)
        epochs = by_epoch(opened) if html is not None else []
        tuned = opened.build(device, model)
        chosen = sample(opened.rows(split, settings.absolute(source), task_index), rows)
        if ablate:
            study = ablation.Ablation(opened, tuned, chosen, task_index)
            report = GateReport(study.gates, chosen, study.task.labels)
        else:
            study, report = None, inspect_gates(opened, tuned, chosen, task_index)
        view = _View(report, study, split, run.resolve().name)
        answer = view.show(by, top, opened.tasks[task_index].text, as_json=as_json)
        if plot is not None:
            view.plot(answer, plot)
        if html is not None:
            from unipelt_cli.gates import page

            classes = report.by_class() if report.gates else ()
            full = replace(answer, classes=classes, epochs=epochs)
            page.write(full, f"gates of {run.resolve().name}", html)
            console.say("page: ", (str(html), "bold"))
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
            from unipelt_cli.files.pictures import check_ending

            check_ending(plot)
        if html is not None:
            from unipelt_cli.gates import page

            page.check(html)


def _epochs(run: Path, plot: Path | None) -> "EpochsInspection":
    """Show what training recorded; the model is not built."""
    from unipelt_cli.system import network

    network.configure_network(offline=True, needed=False)
    with importing():
        from unipelt_cli.gates import plots
        from unipelt_cli.gates.report import by_epoch
        from unipelt_cli.gates.results import EpochsInspection, Layer, MeanGate
        from unipelt_cli.runs.run import read_run
        from unipelt_cli.terminal import gates
    finished_run = read_run(run)
    epochs = by_epoch(finished_run)
    if not epochs and finished_run.result.get("selection") == "schedule":
        raise RunError(
            f"{run}: its epochs hold no gates, as there were no dev rows to see them on",
            "see those of its last epoch with --by layer, or train with --dev-size N",
        )
    if not epochs:
        raise RunError(
            f"{run}: its epochs hold no gates",
            "train a gated method with this version: its epochs record them",
        )
    best = next((epoch.layers for epoch in epochs if epoch.is_best), ())
    title = f"gates of {run.resolve().name}, mean over layers and dev rows"
    result = finished_run.result
    gates.show_epochs(epochs, result["metric"], title, result.get("positive"))
    if plot is not None:
        plots.plot_epochs(epochs, title, plot)
        console.say("picture: ", (str(plot), "bold"))
    return EpochsInspection(
        rows=sum(finished_run.count_of("dev", n) for n in range(len(finished_run.tasks))),
        split="dev",
        layers=[
            Layer(layer.layer, {name: MeanGate(mean) for name, mean in layer.gates.items()})
            for layer in best
        ],
        best_epoch=result["best_epoch"],
        epochs=epochs,
    )


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
    ) -> "Inspection":
        """Print a view and return it as an answer."""
        from unipelt_cli.gates.results import Inspection
        from unipelt_cli.terminal import gates

        report = self.report
        layers, nearly_closed = report.by_layer(), report.nearly_closed()
        answer = Inspection(len(self.rows), self.split, layers, nearly_closed)
        if self.study is not None:
            return replace(answer, ablation=self._ablate(self.study))
        if by == "class":
            classes, differences = report.by_class(), report.differences()
            gates.show_classes(classes, len(self.rows), self.split)
            gates.show_differences(differences)
            return replace(answer, classes=classes, differences=differences)
        if by == "example" and top is not None:
            extremes = report.top(top)
            texts = {row["row"]: " | ".join(str(row[c]) for c in text) for row in self.rows}
            gates.show_top(extremes, texts)
            return replace(answer, top=extremes)
        if by == "example":
            examples = report.by_example()
            if not as_json:
                for example in examples:
                    typer.echo(json.dumps(to_json(example)))
            return replace(answer, examples=examples)
        gates.show_layers(layers, f"{self.title}, mean ± standard deviation")
        gates.show_legend(nearly_closed)
        return answer

    def _ablate(self, study: "Ablation") -> "AblationReport":
        from unipelt_cli.gates import ablation
        from unipelt_cli.terminal import gates, progress
        from unipelt_cli.text import shown_score

        if self.split == "test":
            console.say(("warning: ", "yellow"), "these are test rows: choose nothing by them")
        losses = list(progress.tracked(study.losses(), study.passes, "closing submodules"))
        answer = ablation.summarise(study, losses)
        metric = shown_score(study.task.metric, study.task.positive_label)
        score = f"{metric} {study.score:.4f}"
        title = f"{self.name}, {len(self.rows)} {self.split} rows, {score}"
        gates.show_ablation(answer, title, len(self.rows))
        return answer

    def plot(self, answer: "Inspection", path: Path) -> None:
        """Draw the view as a picture."""
        from unipelt_cli.gates import plots

        if answer.ablation is not None:
            plots.plot_ablation(answer.ablation, self.title, path)
        elif answer.classes is not None:
            plots.plot_classes(answer.classes, self.title, path)
        else:
            plots.plot_layers(answer.layers, f"{self.title}, mean", path)
        console.say("picture: ", (str(path), "bold"))
