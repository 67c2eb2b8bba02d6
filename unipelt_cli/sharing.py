"""The command that publishes a run."""

from typing import TYPE_CHECKING, Annotated

import typer

from unipelt_cli import arguments, network, options, remote, render
from unipelt_cli.libraries import importing
from unipelt_cli.shell import print_json

if TYPE_CHECKING:
    pass

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
    network.settle(offline=False, needed=True)
    directory = arguments.locate(run, offline=False)
    with importing():
        from unipelt_cli import card, runs
    found = runs.read(directory)
    runs.check_file(directory / runs.METRICS, found.result["files"][runs.METRICS])
    upload = remote.prepare(found, repository, private=private, overwrite=overwrite)
    text = card.of_run(found, upload.repository)
    sizes = {name: path.stat().st_size for name, path in upload.files.items()}
    rows = [[name, f"{size:,}", CONTENTS[name]] for name, size in sizes.items()]
    render.table(
        ("published", "bytes", "what is in it"), [*rows, [remote.CARD, f"{len(text):,}", "card"]]
    )
    if paths := upload.local_paths():
        render.say(("note: ", "yellow"), f"paths of this machine in them: {', '.join(paths)}")
    readers = "you and those you let in" if upload.private else "anyone"
    render.say(f"to {upload.repository}, which {readers} can read")
    answer = upload.send(text)
    render.say("pushed: ", (answer["url"], "bold"), f", commit {answer['commit'][:12]}")
    if as_json:
        print_json(answer)
