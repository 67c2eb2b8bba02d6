"""The command that shows a run's gates."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from unipelt_cli import arguments, options, render
from unipelt_cli.errors import ConfigError
from unipelt_cli.shell import print_json


def inspect_gates(
    run: options.RunPath,
    task: options.OneTaskOption = None,
    by: Annotated[str, typer.Option(help="layer, class or example.")] = "layer",
    split: Annotated[str, typer.Option(help="test, dev or train.")] = "test",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the layers as a picture too.")
    ] = None,
    source: options.SourceOption = None,
    device: options.DeviceOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Show how far each submodule's gate opens, layer by layer.

    Example: unipelt inspect-gates runs/mrpc-k500-unipelt-apl-minilm-d111-s42 --plot gates.png
    """
    if by not in ("layer", "class", "example"):
        raise ConfigError(f"--by {by!r}: no such view", "choose one of layer, class, example")
    found = arguments.read_run(run, offline, source, model)
    place = found.place(task)
    tuned = found.build(device, model)
    from unipelt_cli import inspection

    rows = found.rows(split, arguments.absolute(source), place)
    report = inspection.inspect(found, tuned, rows, place)
    layers = report.by_layer()
    count = len(report.rows)
    title = f"gates of {run.resolve().name}, {count} {split} rows"
    answer: dict[str, Any] = {"rows": count, "layers": layers}
    if by == "class":
        answer["classes"] = report.by_class()
        for group in answer["classes"]:
            render.gate_table(group["layers"], f"{group['class']}: {group['rows']} {split} rows")
    elif by == "example":
        answer["examples"] = report.by_example()
        if not as_json:
            for example in answer["examples"]:
                typer.echo(json.dumps(example))
    else:
        render.gate_table(layers, f"{title}, mean ± standard deviation")
    if plot is not None:
        render.plot_gates(layers, f"{title}, mean", plot)
        render.say("picture: ", (str(plot), "bold"))
    if as_json:
        print_json(answer)
