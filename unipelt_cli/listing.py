"""What there is to choose from, and the runs in a directory, as rows of plain values."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from unipelt_cli import config, methods, runs
from unipelt_cli.backbones import BACKBONES, PARTS, Layout
from unipelt_cli.errors import UnipeltError
from unipelt_cli.tasks import TASKS

Entry = dict[str, Any]


def entries(what: str, directory: Path) -> list[Entry]:
    """Return one dictionary an entry; all entries of a list have the same keys."""
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


def _methods(_: Path) -> list[Entry]:
    return [
        {
            "name": name,
            "learning_rate": recipe.learning_rate,
            "what": recipe.summary,
            "source": recipe.source,
        }
        for name, recipe in methods.table().items()
    ]


def _presets(_: Path) -> list[Entry]:
    return [
        {"name": name, "what": path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")}
        for name, path in config.presets().items()
    ]


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
    for path in sorted(directory.glob(f"**/{runs.EXPERIMENT}")):
        entry: Entry = dict.fromkeys(("run", "status", "metric", "dev", "test", "seconds"))
        entry["run"] = str(path.parent.relative_to(directory))
        try:
            result = runs.read(path.parent).result
        except UnipeltError:
            is_damaged = (path.parent / runs.RESULT).is_file()
            entry["status"] = "damaged" if is_damaged else runs.describe_progress(path.parent)
        else:
            metric = result["metric"]
            entry |= {"status": "finished", "metric": metric, "seconds": result["seconds"]}
            entry |= {split: result[split][metric] for split in ("dev", "test")}
        listed.append(entry)
    return listed


LISTS: Mapping[str, Callable[[Path], list[Entry]]] = MappingProxyType(
    {
        "tasks": _tasks,
        "methods": _methods,
        "presets": _presets,
        "backbones": _backbones,
        "runs": _runs,
    }
)
