"""The command `export`: write a run for another tool."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unipelt_cli.commands.shared import options, run_argument, settings
from unipelt_cli.errors import CheckError, ConfigError
from unipelt_cli.exports import formats
from unipelt_cli.runs.opening import open_run
from unipelt_cli.terminal import console, summaries
from unipelt_cli.terminal.command_group import print_json

if TYPE_CHECKING:
    from unipelt_cli.exports.report import ExportReport
    from unipelt_cli.gates.static_gates import Static
    from unipelt_cli.models.tuned import TunedModel
    from unipelt_cli.runs.run import Run


def export(
    run: options.RunPath,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT", help=f"One of {', '.join(formats.TARGETS)}.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to. (default RUN-FORMAT)")
    ] = None,
    static_gates: Annotated[
        bool,
        typer.Option(
            "--static-gates",
            help="Make every gate a constant, its mean over train, and drop submodules that dev "
            "does not miss.",
        ),
    ] = False,
    cost: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="SCORE",
            help="What --static-gates may cost of the dev score. (default 0.01)",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="peft: one part of a union alone, which is another model: lora."),
    ] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="onnx: numbers of 16 bits, half the size.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="How far logits may differ. (default 1e-4, with --fp16 0.05; of a regression "
            "times the deviation of its labels)",
            show_default=False,
        ),
    ] = None,
    source: options.SourceOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Write a run in another tool's format, and check that it computes the same there.

    Where it does not, nothing is written, and the exit code is 1.

    Example: unipelt export RUN --to adapters
    """
    name = _check_options(to, part, fp16, tolerance, None if static_gates else cost)
    directory = out or run_argument.default_output(run, name)
    finished = open_run(
        run_argument.locate(run, offline), offline=offline, source=source, model=model
    )
    tuned = finished.build("cpu", model)
    from unipelt_cli.exports.export import export_run
    from unipelt_cli.files import atomic

    static, where = None, settings.absolute(source)
    if static_gates:
        atomic.refuse_existing(directory)
        made = _fix_gates(finished, tuned, name, where, cost)
        finished, tuned, static = made.run, made.tuned, made.report
    report = export_run(
        finished,
        tuned,
        name,
        directory,
        source=where,
        tolerance=tolerance,
        part=part,
        half=fp16,
        static=static,
    )
    _show(report, name)
    if as_json:
        print_json(report)
    if not report.written:
        raise CheckError(
            f"{report.path}: not written, its logits differ by "
            f"{report.parity.max_abs_logit_diff:.2g}, and {report.tolerance:g} is allowed",
            _advice(part, fp16),
        )


def _check_options(
    to: str | None, part: str | None, fp16: bool, tolerance: float | None, idle_cost: float | None
) -> str:
    """Return the name of the format; `idle_cost` is a `--cost` that nothing would use."""
    if to is None:
        names = ", ".join(formats.TARGETS)
        raise ConfigError("export: there is no --to FORMAT", f"add --to with one of {names}")
    formats.get(to)
    if part is not None:
        formats.only(to, f"--part {part}", lambda target: target.has_parts)
    if fp16:
        formats.only(to, "--fp16", lambda target: target.has_half)
    if tolerance is not None and not tolerance > 0:
        raise ConfigError(f"--tolerance {tolerance}: not above 0", "give a number such as 1e-4")
    if flag := settings.flag_text("--cost", idle_cost):
        raise ConfigError(f"{flag}: only --static-gates costs anything", "give that too")
    return to


def _fix_gates(
    run: "Run", tuned: "TunedModel", name: str, source: str | None, cost: float | None
) -> "Static":
    """Turn a run's gates into their means, as a format can hold it, and say what that costs."""
    from unipelt_cli.gates.static_gates import COST, make_static

    misfit = tuned.misfit()
    if formats.get(name).needs_library_head and misfit is not None:
        raise ConfigError(
            f"--to {name}: holds no head that reads {misfit.reads}, with or without gates",
            f"train with {misfit.flags}, or use --to adapters or --to onnx",
        )
    rows, only = partial(run.rows, source=source), formats.get(name).holds
    made = make_static(run, tuned, rows, cost=COST if cost is None else cost, only=only)
    summaries.static_summary(made.report)
    return made


def _show(report: "ExportReport", name: str) -> None:
    """Say where the export is, and how near it comes to its run."""
    parity, path = report.parity, (report.path, "bold")
    difference = f"largest logit difference {parity.max_abs_logit_diff:.1e}"
    flips = f"{parity.label_flips} labels differ" if parity.label_flips else "same labels"
    console.reply(f"{name}: ", path, f", {difference} over {parity.rows} rows, {flips}")
    for note in report.notes:
        console.say(("note: ", "yellow"), note)
    if report.written:
        console.say("its README.md is a model card, and says how to load it")


def _advice(part: str | None, fp16: bool) -> str:
    """Say what to do about an export that computes something else."""
    if part is not None:
        return "a part is another model: --tolerance NUMBER says how far it may be off"
    if fp16:
        return "export it without --fp16, or say with --tolerance how far it may be off"
    return "please report it with the run's experiment.toml"
