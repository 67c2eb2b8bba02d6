"""The options that commands share, and those of `train`: names, help, panels."""

from pathlib import Path
from typing import Annotated, Any

import typer

WHERE, HOW, OUTPUT = "Data", "Method and training", "Output"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Offline = Annotated[bool, typer.Option("--offline", help="Open no network connection.")]
RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run directory, or hub:OWNER/NAME[@REVISION]."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or mps.", rich_help_panel=HOW)
]
SourceOption = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="DIR|hub",
        help="A directory in GLUE's layout, or hub. (default $UNIPELT_DATA, else hub)",
        rich_help_panel=WHERE,
    ),
]


def data_option(name: str, help: str, **kwargs: Any) -> Any:
    """Declare an option of the panel about rows."""
    return typer.Option(name, help=help, rich_help_panel=WHERE, **kwargs)


OneTaskOption = Annotated[
    str | None,
    typer.Option("--task", metavar="NAME", help="Which task, of a run on several."),
]
EncodingOption = Annotated[
    str | None,
    data_option(
        "--encoding",
        "Of your text files. (default: their byte-order mark says it, else UTF-8)",
        metavar="NAME",
    ),
]
FileTextOption = Annotated[
    str | None, typer.Option("--text", metavar="COLUMN", help="What FILE calls the text column.")
]
FileTextPairOption = Annotated[
    str | None,
    typer.Option("--text-pair", metavar="COLUMN", help="What FILE calls the second text column."),
]
LabelOption = Annotated[str | None, data_option("--label", "The label column.", metavar="COLUMN")]


MethodOption = Annotated[
    str | None,
    typer.Option(help="See `unipelt list methods`. (default unipelt-apl)", rich_help_panel=HOW),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|DIR",
        help="The backbone: a hub name, a directory, or minilm. (default minilm)",
        rich_help_panel=HOW,
    ),
]
MovedModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR", help="Where the run's backbone is now."),
]
SeedOption = Annotated[
    int | None,
    typer.Option(help="Initialises and shuffles. (default 42)", rich_help_panel=HOW),
]
SeedsOption = Annotated[
    str | None,
    typer.Option("--seeds", metavar="A,B,…", help="A run for each.", rich_help_panel=HOW),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Settings to start from: a name or a TOML file.",
        rich_help_panel=HOW,
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Any setting; may be repeated.",
        rich_help_panel=HOW,
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        help="auto, fp32 or bf16; auto is bf16 where the hardware is fast at it.",
        rich_help_panel=HOW,
    ),
]
SkipOption = Annotated[
    bool,
    typer.Option(
        "--skip-unusable",
        help="Pass over rows without a text or label. (default as the run was trained)",
    ),
]
RunPrecisionOption = Annotated[
    str | None, typer.Option("--precision", help="fp32 or bf16. (default the run's own)")
]
RunOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="The run directory; of several runs, where theirs go. "
        "(default runs/TASK-kK-METHOD-BACKBONE-dSEED-sSEED)",
        rich_help_panel=OUTPUT,
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Start a run that is not there, go on with an interrupted one, return a finished one.",
        rich_help_panel=OUTPUT,
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run there.", rich_help_panel=OUTPUT)
]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Tell a tracker too: tensorboard, wandb; may be repeated.",
        rich_help_panel=OUTPUT,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, write nothing.", rich_help_panel=OUTPUT),
]
