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


def _data(name: str, help: str, **kwargs: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel=WHERE, **kwargs)


TaskOption = Annotated[str | None, _data("--task", "A task: see `unipelt list tasks`.")]
TasksOption = Annotated[
    str | None,
    _data("--tasks", "Several tasks at once, by one model with a head each.", metavar="A,B"),
]
OneTaskOption = Annotated[
    str | None,
    typer.Option("--task", metavar="NAME", help="Which task, of a run on several."),
]
KOption = Annotated[int | None, _data("--k", "Train on so many rows. (default all)")]
DataSeedOption = Annotated[
    int | None, _data("--data-seed", "Draws the rows. (default 111)", show_default=False)
]
DataSeedsOption = Annotated[
    str | None,
    _data("--data-seeds", "A run for each, all in one pass where the method can.", metavar="A,B,…"),
]
DevSizeOption = Annotated[
    int | None, _data("--dev-size", "Dev rows; 0: none. (default 1000)", show_default=False)
]
FoldsOption = Annotated[
    str | None,
    _data("--folds", "Test every train row, by N trainings without it.", metavar="N|none"),
]
DatasetOption = Annotated[
    str | None, _data("--dataset", "Any hub data set.", metavar="NAME[:CONFIG]")
]
TrainFileOption = Annotated[
    str | None,
    _data("--train-file", "Your rows: .csv, .tsv, .jsonl, .json, .parquet.", metavar="FILE"),
]
DevFileOption = Annotated[str | None, _data("--dev-file", "Your dev rows.", metavar="FILE")]
TestFileOption = Annotated[str | None, _data("--test-file", "Your test rows.", metavar="FILE")]
EncodingOption = Annotated[
    str | None,
    _data(
        "--encoding",
        "Of your text files. (default: their byte-order mark says it, else UTF-8)",
        metavar="NAME",
    ),
]
TextOption = Annotated[str | None, _data("--text", "The text column.", metavar="COLUMN")]
TextPairOption = Annotated[
    str | None, _data("--text-pair", "The second text column, for pairs.", metavar="COLUMN")
]
FileTextOption = Annotated[
    str | None, typer.Option("--text", metavar="COLUMN", help="What FILE calls the text column.")
]
FileTextPairOption = Annotated[
    str | None,
    typer.Option("--text-pair", metavar="COLUMN", help="What FILE calls the second text column."),
]
LabelOption = Annotated[str | None, _data("--label", "The label column.", metavar="COLUMN")]


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
PreparedOption = Annotated[
    str | None,
    _data("--prepared", "A directory that `prepare` wrote, or several with commas.", metavar="DIR"),
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
