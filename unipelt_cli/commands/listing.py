"""The command `list`: what there is to choose from, and the runs in a directory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from unipelt_cli.commands.shared import options, settings
from unipelt_cli.errors import ConfigError, nearest
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal import console, summaries, tables
from unipelt_cli.terminal.command_group import print_json

if TYPE_CHECKING:
    from unipelt_cli.backbones.layout import Layout

Entry = dict[str, Any]


def list_(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="tasks, methods, presets, sweeps, backbones or runs."),
    ],
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the runs are.")] = Path(
        "runs"
    ),
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR", help="The backbone that methods are counted on. (default BERT-base)"
        ),
    ] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """List what there is to choose from, or the runs in a directory.

    Example: unipelt list methods --model minilm
    """
    if model is not None and what != "methods":
        raise ConfigError(f"--model {model!r}: only methods are counted on one", "drop --model")
    if model is not None:
        settings.settle_backbone(model, offline)
    if what not in LISTS:
        raise ConfigError(f"list {what!r}: no such list", nearest(what, LISTS))
    listed = entries(what, directory, model)
    if as_json:
        print_json({what: listed})
        return
    if what == "methods":
        summaries.method_table(listed, model or "BERT-base")
        return
    columns = list(listed[0]) if listed else []
    tables.table(columns, [[tables.cell(entry[c]) for c in columns] for entry in listed])
    if not listed:
        console.say(f"no {what} in {directory}")


def entries(what: str, directory: Path, model: str | None = None) -> list[Entry]:
    """Return one dictionary an entry; all entries of a list have the same keys.

    `model` is the backbone on which methods are counted; without it, BERT-base.
    """
    return _methods(model) if what == "methods" else LISTS[what](directory)


def _tasks(_: Path) -> list[Entry]:
    with importing():
        from unipelt_cli.tasks import TASKS

    return [
        {
            "name": task.name,
            "text": task.text,
            "labels": task.labels or ("a number",),
            "metric": task.metric,
        }
        for task in TASKS.values()
    ]


def _methods(model: str | None = None) -> list[Entry]:
    """Count what every method trains and stores beside a head for two labels."""
    with importing():
        from unipelt_cli import methods
        from unipelt_cli.backbones.pretrained import BERT_BASE, find
        from unipelt_cli.models.build import count, skeleton
        from unipelt_cli.models.classifier import HeadShape

    def by_category(entry: tuple[str, methods.Recipe]) -> tuple[int, str]:
        return get_args(methods.Category).index(entry[1].category), entry[0]

    pretrained = BERT_BASE if model is None else find(model)
    config = pretrained.library_config()
    head = HeadShape(config.hidden_size, None, normalise=False).size(2)
    bare = skeleton(pretrained)
    listed = []
    for name, recipe in sorted(methods.table().items(), key=by_category):
        method = recipe.method
        refusal = next(method.refusals(pretrained.layout, config), None)
        counts = (None, None) if refusal else count(method, pretrained, head, bare=bare)
        listed.append(
            {
                "name": name,
                "category": recipe.category,
                "trainable": counts[0],
                "stored": counts[1],
                "mergeable": method.unmergeable is None,
                "paper": recipe.source,
                "learning_rate": None if method.has_closed_form else recipe.learning_rate,
                "paper_rate": recipe.paper_rate,
                "paper_optimizer": recipe.published and recipe.published.optimizer,
                "what": recipe.summary,
                "refusal": refusal and refusal[0],
            }
        )
    return listed


def _presets(_: Path) -> list[Entry]:
    """Return the shipped files, every method, few labels' and every paper's recipes, by name."""
    with importing():
        from unipelt_cli import methods
        from unipelt_cli.config import presets

    summaries = {name: recipe.summary for name, recipe in methods.table().items()}
    for name, path in presets.presets().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        summaries[name] = first.removeprefix(f"{name}: ")
    for name in presets.few_labels_presets():
        method = name.removeprefix(presets.FEW_LABELS)
        summaries[name] = f"{method} by the recipe for few labels"
    for name, published in presets.published_presets().items():
        method = name.removeprefix(presets.PUBLISHED)
        values = {**published.get("model", {}), **published["train"], **published["method"]}
        del values["name"]
        listed = ", ".join(f"{key} {value}" for key, value in values.items())
        summaries[name] = f"{method} as {methods.get(method).source} trained it: {listed}"
    return [{"name": name, "what": what} for name, what in sorted(summaries.items())]


def _sweeps(_: Path) -> list[Entry]:
    """Return the shipped grids."""
    with importing():
        from unipelt_cli.config.presets import sweep_presets

    summaries = {
        name: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for name, path in sweep_presets().items()
    }
    return [{"name": name, "what": what} for name, what in summaries.items()]


def _backbones(_: Path) -> list[Entry]:
    with importing():
        from unipelt_cli.backbones.architectures import BACKBONES
        from unipelt_cli.backbones.layout import PARTS

    return [
        {
            "architecture": layout.model_type,
            "attention": layout.attentions,
            **{part: "yes" if part in layout.parts else "no" for part in PARTS},
            "native head": _native_head(layout),
        }
        for layout in BACKBONES.values()
    ]


def _native_head(layout: "Layout") -> str:
    if layout.native is None:
        return "none"
    return "pooler + linear" if layout.native.pooler else "dense + linear"


def _runs(directory: Path) -> list[Entry]:
    """Read every run below a directory; unfinished and damaged ones are listed as such."""
    with importing():
        from unipelt_cli.runs.discovery import runs_below

    listed = []
    for path, run in runs_below(directory):
        entry: Entry = dict.fromkeys(("run", "status", "metric", "dev", "test", "seconds"))
        entry["run"] = str(path.relative_to(directory))
        if isinstance(run, str):
            entry["status"] = run
        else:
            result, metric = run.result, run.result["metric"]
            entry |= {"status": "finished", "metric": metric, "seconds": result["seconds"]}
            entry |= {split: result[split].get(metric) for split in ("dev", "test")}
        listed.append(entry)
    return listed


LISTS: Mapping[str, Callable[[Path], list[Entry]]] = MappingProxyType(
    {
        "tasks": _tasks,
        "methods": lambda _: _methods(),
        "presets": _presets,
        "sweeps": _sweeps,
        "backbones": _backbones,
        "runs": _runs,
    }
)
