"""Imports point one way, and starting the command does not wait for torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import unipelt_cli

PACKAGE = Path(unipelt_cli.__file__).parent
RANKS = {
    "errors": 0,
    "strict": 0,
    "columnar": 1,
    "libraries": 1,
    "habits": 1,
    "network": 1,
    "talk": 1,
    "outline": 0,
    "artifact": 1,
    "dropout": 1,
    "gradients": 3,
    "memory": 1,
    "processes": 2,
    "workers": 1,
    "backbones": 1,
    "claims": 2,
    "completion": 2,
    "untrusted": 3,
    "tasks": 1,
    "methods": 2,
    "weighted": 2,
    "significance": 3,
    "published": 4,
    "sheets": 1,
    "documents": 2,
    "charts": 2,
    "groups": 10,
    "pairs": 11,
    "against": 11,
    "compare": 12,
    "config": 3,
    "formats": 4,
    "grid": 4,
    "pretrained": 4,
    "batches": 4,
    "lines": 1,
    "cells": 2,
    "forms": 3,
    "readers": 4,
    "manifest": 4,
    "guess": 5,
    "sources": 5,
    "modeling": 6,
    "data": 6,
    "evaluation": 7,
    "training": 8,
    "runs": 8,
    "writer": 9,
    "adapterhub": 10,
    "peftfolder": 10,
    "onnxfile": 10,
    "card": 10,
    "plain": 11,
    "targets": 1,
    "exchange": 9,
    "together": 9,
    "execution": 10,
    "inspection": 9,
    "ablation": 9,
    "gatetables": 10,
    "gatecharts": 10,
    "gatepage": 10,
    "remote": 9,
    "serving": 10,
    "listing": 9,
    "render": 9,
    "screen": 10,
    "export": 12,
    "static": 11,
    "provenance": 11,
    "options": 11,
    "arguments": 11,
    "doctor": 11,
    "estimate": 11,
    "recommend": 11,
    "cluster": 12,
    "local": 11,
    "sweep": 11,
    "worker": 11,
    "shell": 11,
    "tracking": 11,
    "watching": 12,
    "several": 13,
    "before": 13,
    "finished": 13,
    "inside": 13,
    "shipping": 13,
    "sharing": 13,
    "cli": 14,
    "__main__": 15,
}
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE
)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the modules of this package that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "unipelt_cli":
            found |= {alias.name for alias in node.names if alias.name in RANKS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unipelt_cli."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("unipelt_cli.")}
    return found


def test_every_module_has_a_rank() -> None:
    assert {name_of(path) for path in MODULES} == RANKS.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_strictly_downward(path: Path) -> None:
    own = name_of(path)
    upward = {
        other
        for other in imported(path)
        if RANKS[other] >= RANKS[own] and not (own == other == "methods")
    }
    assert not upward


def test_only_what_people_see_uses_rich_and_only_two_modules_use_adapters() -> None:
    users: dict[str, set[str]] = {"rich": set(), "adapters": set()}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.split(".")[0] in users:
                    users[name.split(".")[0]].add(str(path.relative_to(PACKAGE)))
    assert users == {
        "rich": {"render.py", "screen.py", "talk.py", "gatetables.py"},
        "adapters": {"adapterhub.py", "methods/hub.py"},
    }


def test_the_table_of_methods_does_not_wait_for_adapters() -> None:
    code = (
        "import sys\n"
        "from unipelt_cli import methods\n"
        "assert 'compacter' in methods.table()\n"
        "print('adapters' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["trian"]])
def test_help_and_mistyped_commands_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from unipelt_cli.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip().endswith("[]")
