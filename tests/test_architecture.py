"""Imports point one way, and starting the command does not wait for torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import unipelt_cli

PACKAGE = Path(unipelt_cli.__file__).parent
ORDER = (
    {"__main__"},
    {"cli"},
    {"commands"},
    {"terminal"},
    {"exports", "sweeps"},
    {"comparison", "gates", "training"},
    {"runs"},
    {"data", "models"},
    {"config"},
    {"methods"},
    {"backbones"},
    {"tasks"},
    {"metrics"},
    {"files", "system"},
    {"errors", "text", "version"},
)
"""From the top: a package imports those of the lines below its own, and itself."""
RANKS = {package: rank for rank, packages in enumerate(ORDER) for package in packages}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
"""The package's files by the names that imports give them, without the package's own."""


def imported(path: Path) -> Iterator[str]:
    """Yield what a file imports, at any depth of its code, as whole names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def file_of(name: str) -> str | None:
    """Return the file of this package behind an imported name: a module, or what it defines."""
    parts = name.removeprefix("unipelt_cli.").split(".")
    if not name.startswith("unipelt_cli."):
        return None
    for candidate in (parts, parts[:-1], [*parts, "__init__"], [*parts[:-1], "__init__"]):
        if ".".join(candidate) in FILES:
            return ".".join(candidate)
    raise AssertionError(f"{name} is in no file of the package")


def imports_of(file: str) -> set[str]:
    """Return the files of this package that one of them imports."""
    return {other for name in imported(FILES[file]) if (other := file_of(name)) is not None}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Return the files of one circle of imports, in its order; nothing where there is none."""
    done: set[str] = set()

    def walk(file: str, way: list[str]) -> list[str]:
        if file in way:
            return [*way[way.index(file) :], file]
        if file in done:
            return []
        for other in sorted(edges[file]):
            if found := walk(other, [*way, file]):
                return found
        done.add(file)
        return []

    return next((found for file in edges if (found := walk(file, []))), [])


def test_every_package_has_its_place_in_the_order() -> None:
    assert {file.split(".")[0] for file in FILES} == RANKS.keys()


def test_imports_between_packages_point_downward() -> None:
    upward = [
        f"{file} imports {other}"
        for file in FILES
        for other in sorted(imports_of(file))
        if (own := file.split(".")[0]) != (theirs := other.split(".")[0])
        and RANKS[own] >= RANKS[theirs]
    ]
    assert not upward


def test_no_file_imports_itself_through_others() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({file: imports_of(file) for file in FILES}) == []


USERS = {
    "rich": {"terminal"},
    "typer": {"cli", "commands", "terminal"},
    "adapters": {"exports.adapters_folder", "methods.additive.compacter"},
}
"""The only places that may import a library."""


@pytest.mark.parametrize("library", USERS)
def test_a_library_is_imported_in_its_places_alone(library: str) -> None:
    users = {
        file
        for file, path in FILES.items()
        if library in {name.split(".")[0] for name in imported(path)}
    }
    assert users
    assert not [f for f in users if not any(f"{f}.".startswith(f"{p}.") for p in USERS[library])]


def test_adapters_is_imported_inside_functions_alone() -> None:
    """It patches the library's models as it is imported."""
    for path in FILES.values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = {id(inner) for function in functions for inner in ast.walk(function)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "adapters" for name in names):
                assert id(node) in inside, f"{path.name} line {node.lineno}"


def test_folders_are_documented_and_small_enough_to_read() -> None:
    for folder in {path.parent for path in FILES.values()}:
        (docstring,) = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body[:1]
        assert isinstance(docstring, ast.Expr), folder
        assert len([f for f in folder.glob("*.py") if f.name != "__init__.py"]) <= 14, folder


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


def test_help_and_mistyped_commands_do_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from unipelt_cli.cli import app\n"
        "for line in sys.argv[1:]:\n"
        "    app(line.split(), standalone_mode=False)\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()\n"
        "    assert not heavy, (line, heavy)\n"
        "print('all ran')\n"
    )
    lines = ["--version", "--help", "train --help", "trian"]
    result = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all ran\n")
