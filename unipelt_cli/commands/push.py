"""The command `push`: publish a run on the hub."""

from typing import Annotated

import typer

from unipelt_cli.commands.shared import options, run_argument
from unipelt_cli.runs import hub
from unipelt_cli.system import network
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal import console, tables
from unipelt_cli.terminal.command_group import print_json

CONTENTS = {
    "experiment.toml": "settings, paths of data and backbone",
    "environment.json": "versions, machine, command, row ids, labels",
    "probe.safetensors": "logits of random tokens",
    "metrics.jsonl": "losses and dev scores",
    "model.safetensors": "trained tensors, names of labels",
    "predictions.safetensors": "test predictions and labels, as numbers",
    "result.json": "scores, hashes of these files",
}


def push(
    run: options.RunPath,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where to, on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is there.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Publish a finished run on the Hugging Face hub; hub:OWNER/NAME then names it everywhere.

    Example: unipelt push runs/mrpc-k500-unipelt-apl-minilm-d111-s42 you/mrpc-apl
    """
    network.configure_network(offline=False, needed=True)
    directory = run_argument.locate(run, offline=False)
    with importing():
        from unipelt_cli.exports import model_card
        from unipelt_cli.runs.checks import check_file
        from unipelt_cli.runs.names import METRICS
        from unipelt_cli.runs.run import read_run
    finished_run = read_run(directory)
    check_file(directory / METRICS, finished_run.result["files"][METRICS])
    upload = hub.prepare(finished_run, repository, private=private, overwrite=overwrite)
    text = model_card.of_run(finished_run, upload.repository)
    sizes = {name: path.stat().st_size for name, path in upload.files.items()}
    rows = [[name, f"{size:,}", CONTENTS[name]] for name, size in sizes.items()]
    rows.append([hub.CARD, f"{len(text):,}", "card"])
    tables.table(("published", "bytes", "what is in it"), rows, console.console())
    if paths := upload.local_paths():
        console.say(("note: ", "yellow"), f"paths of this machine in them: {', '.join(paths)}")
    readers = "you and those you let in" if upload.private else "anyone"
    console.say(f"to {upload.repository}, which {readers} can read")
    answer = upload.send(text)
    console.reply("pushed: ", (answer.url, "bold"), f", commit {answer.commit[:12]}")
    if as_json:
        print_json(answer)
