"""What there is to choose from, and the runs in a directory, as rows of plain values."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from unipelt_cli import methods
from unipelt_cli.backbones.architectures import BACKBONES, PARTS, Layout
from unipelt_cli.backbones.pretrained import BERT_BASE, Pretrained, find
from unipelt_cli.config import experiment
from unipelt_cli.errors import UnipeltError
from unipelt_cli.models.build import Head, count, skeleton
from unipelt_cli.runs.run import EXPERIMENT, RESULT, Run, describe_progress, read
from unipelt_cli.tasks import TASKS

Entry = dict[str, Any]


def entries(what: str, directory: Path, model: str | None = None) -> list[Entry]:
    """Return one dictionary an entry; all entries of a list have the same keys.

    `model` is the backbone on which methods are counted; without it, BERT-base.
    """
    if what == "methods":
        return _methods(BERT_BASE if model is None else find(model))
    return LISTS[what](directory)


def _tasks(_: Path) -> list[Entry]:
    return [
        {
            "name": task.name,
            "text": task.text,
            "labels": task.labels or ("a number",),
            "metric": task.metric,
        }
        for task in TASKS.values()
    ]


def _methods(pretrained: Pretrained) -> list[Entry]:
    """Count what every method trains and stores beside a head for two labels."""
    config = pretrained.library_config()
    head = Head.size(config.hidden_size, 2, has_dense=False)
    bare = skeleton(pretrained)
    listed = []
    for name, recipe in sorted(methods.table().items(), key=_by_category):
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
                "learning_rate": recipe.learning_rate,
                "what": recipe.summary,
                "refusal": refusal and refusal[0],
            }
        )
    return listed


def _by_category(entry: tuple[str, methods.Recipe]) -> tuple[int, str]:
    return get_args(methods.Category).index(entry[1].category), entry[0]


def methods_markdown() -> str:
    """Return the README's table of methods: what is in the table of the code, counted."""
    lines = [
        "| `--method` | what trains, beside the head | paper | trainable | stored | merges |",
        "|---|---|---|--:|--:|---|",
    ]
    category = None
    for entry in _methods(BERT_BASE):
        if entry["category"] != category:
            category = entry["category"]
            lines.append(f"| **{category}** | | | | | |")
        merges = "yes" if entry["mergeable"] else ""
        lines.append(
            f"| `{entry['name']}` | {entry['what']} | {entry['paper']} "
            f"| {entry['trainable']:,} | {entry['stored']:,} | {merges} |"
        )
    return "\n".join(lines) + "\n"


def _presets(_: Path) -> list[Entry]:
    """Return the shipped files, and every method without one: its name is a preset as well."""
    said = {name: recipe.summary for name, recipe in methods.table().items()}
    for name, path in experiment.presets().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        said[name] = first.removeprefix(f"{name}: ")
    return [{"name": name, "what": what} for name, what in sorted(said.items())]


def _sweeps(_: Path) -> list[Entry]:
    """Return the shipped grids."""
    said = {
        name: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for name, path in experiment.sweep_presets().items()
    }
    return [{"name": name, "what": what} for name, what in said.items()]


def _backbones(_: Path) -> list[Entry]:
    return [
        {
            "architecture": layout.model_type,
            "attention": layout.attentions,
            **{part: "yes" if part in layout.parts else "no" for part in PARTS},
            "native head": _native_head(layout),
        }
        for layout in BACKBONES.values()
    ]


def _native_head(layout: Layout) -> str:
    if layout.native is None:
        return "none"
    return "pooler + linear" if layout.native.pooler else "dense + linear"


def _runs(directory: Path) -> list[Entry]:
    """Read every run below a directory; unfinished and damaged ones are listed as such."""
    listed = []
    for path, run in runs_below(directory):
        entry: Entry = dict.fromkeys(("run", "status", "metric", "dev", "test", "seconds"))
        entry["run"] = str(path.relative_to(directory))
        if isinstance(run, str):
            entry["status"] = run
        else:
            result, metric = run.result, run.result["metric"]
            entry |= {"status": "finished", "metric": metric, "seconds": result["seconds"]}
            entry |= {split: result[split][metric] for split in ("dev", "test")}
        listed.append(entry)
    return listed


def runs_below(directory: Path) -> Iterator[tuple[Path, Run | str]]:
    """Yield each run at any depth below a directory, or what is the matter with it, by path."""
    for path in sorted(directory.glob(f"**/{EXPERIMENT}")):
        try:
            yield path.parent, read(path.parent)
        except UnipeltError:
            yield path.parent, _unfinished(path.parent)


def _unfinished(directory: Path) -> str:
    if (directory / RESULT).is_file():
        return "damaged"
    try:
        return describe_progress(directory)
    except UnipeltError:
        return "damaged"


LISTS: Mapping[str, Callable[[Path], list[Entry]]] = MappingProxyType(
    {
        "tasks": _tasks,
        "methods": lambda _: _methods(BERT_BASE),
        "presets": _presets,
        "sweeps": _sweeps,
        "backbones": _backbones,
        "runs": _runs,
    }
)
