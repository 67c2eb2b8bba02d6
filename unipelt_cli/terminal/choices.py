"""The names in the tables of tasks, methods and settings, read from their source.

Importing the tables themselves takes torch, and seconds: too long for a shell that completes a
word, and for an answer to a mistyped option. What is read here cannot be another than they hold.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SECTIONS = {"data": "DataSettings", "model": "ModelSettings", "train": "TrainSettings"}


@dataclass(frozen=True)
class Setting:
    """What a setting is for, the few values that it takes if it takes few, and its default."""

    about: str
    choices: tuple[str, ...]
    default: str | None


@dataclass(frozen=True)
class Method:
    """What a method trains, and the call in some file whose class has its settings as fields."""

    about: str
    made_by: ast.Call
    path: Path
    is_published: bool
    """Whether the table holds what its paper trains with, so that `published/NAME` is a preset."""


@cache
def tasks() -> tuple[str, ...]:
    """Return the names of the table of tasks."""
    calls = _calls(_parsed(PACKAGE / "tasks.py"), "Task")
    return tuple(str(_literal(call.args[0])) for call in calls)


@cache
def methods() -> Mapping[str, Method]:
    """Return the methods by name."""
    methods_by_name = {}
    for path in sorted((PACKAGE / "methods").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        _, start, table = text.partition("\nMETHODS")
        aliases = _assigned(_parsed(path)) if start else {}
        for node in ast.walk(ast.parse(start + table)) if start else ():
            if not isinstance(node, ast.Dict):
                continue
            for key, recipe in zip(node.keys, node.values, strict=True):
                if isinstance(recipe, ast.Call) and _name(recipe.func) == "Recipe":
                    method, _, _, about = recipe.args[:4]
                    assert isinstance(method, ast.Call)
                    name = str(_literal(key))
                    paper = _published(recipe, aliases)
                    methods_by_name[name] = Method(str(_literal(about)), method, path, paper)
    return dict(sorted(methods_by_name.items()))


def _published(recipe: ast.Call, aliases: Mapping[str, ast.expr]) -> bool:
    """Say whether a recipe has its paper's numbers, and these are for AdamW."""
    published = next(
        (keyword.value for keyword in recipe.keywords if keyword.arg == "published"), None
    )
    call = aliases.get(published.id) if isinstance(published, ast.Name) else published
    if not isinstance(call, ast.Call):
        return False
    return not any(keyword.arg == "optimizer" for keyword in call.keywords)


@cache
def presets() -> tuple[str, ...]:
    """Return the names of the shipped presets: in the wheel inside the package, else beside it."""
    folders = (PACKAGE / "presets", PACKAGE.parent / "presets")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return tuple(sorted(path.stem for path in folder.glob("*.toml")))


@cache
def published_presets() -> tuple[str, ...]:
    """Return the names of the presets that are papers' own numbers."""
    return tuple(f"published/{name}" for name, method in methods().items() if method.is_published)


@cache
def settings(section: str) -> Mapping[str, Setting]:
    """Return the settings of data, model or train, by key."""
    return _fields(PACKAGE / "config" / "sections.py", SECTIONS[section])


@cache
def method_settings(name: str) -> Mapping[str, Setting]:
    """Return a method's own settings, by key, with the values that its entry of the table has."""
    method = methods()[name]
    fields, call = _fields(method.path, _name(method.made_by.func)), method.made_by
    written = dict(zip(fields, call.args, strict=False)) | _keywords(call, method.path)
    changed = {
        key: replace(fields[key], default=_written(_literal(value)))
        for key, value in written.items()
    }
    return fields | changed


def _keywords(call: ast.Call, path: Path) -> dict[str, ast.expr]:
    """Return what a call gives by name, also out of dictionaries (`**NAME`) of its file."""
    values: dict[str, ast.expr] = {}
    for keyword in call.keywords:
        if keyword.arg is not None:
            values[keyword.arg] = keyword.value
            continue
        shared = _assigned(_parsed(path))[_name(keyword.value)]
        assert isinstance(shared, ast.Dict)
        values |= {
            str(_literal(key)): value for key, value in zip(shared.keys, shared.values, strict=True)
        }
    return values


def _fields(path: Path, class_name: str) -> dict[str, Setting]:
    """Return the annotated fields of a class, and of its bases wherever they are imported from."""
    tree = _parsed(path)
    aliases = _assigned(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            settings: dict[str, Setting] = {}
            for base in node.bases:
                settings |= _fields(path, _name(base))
            annotated = (field for field in node.body if isinstance(field, ast.AnnAssign))
            return settings | {_name(field.target): _setting(field, aliases) for field in annotated}
        if isinstance(node, ast.ImportFrom) and class_name in [alias.name for alias in node.names]:
            source = PACKAGE.joinpath(*str(node.module).split(".")[1:]).with_suffix(".py")
            return _fields(source, class_name) if source.is_file() else {}
    return {}


def _assigned(tree: ast.Module) -> dict[str, ast.expr]:
    """Return what a file gives names to at its top."""
    values = {
        _name(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)
    }
    return values | {
        _name(node.target): node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and node.value is not None
    }


def _setting(field: ast.AnnAssign, aliases: Mapping[str, ast.expr]) -> Setting:
    about, default = "", field.value
    for call in _calls(field, "Field"):
        about = next(
            (str(_literal(k.value)) for k in call.keywords if k.arg == "description"), about
        )
        if call is field.value:
            default = call.args[0] if call.args else None
    is_literal = default is not None and not isinstance(default, ast.Call)
    value = _literal(default) if is_literal else None
    choices = tuple(_choices(field.annotation, aliases))
    return Setting(about, choices, _written(value))


def _choices(annotation: ast.expr, aliases: Mapping[str, ast.expr]) -> Iterator[str]:
    """Yield what an annotation allows, where that is a few words."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name) and node.id in aliases:
            yield from _choices(aliases[node.id], {})
        elif isinstance(node, ast.Name) and node.id == "bool":
            yield from ("true", "false")
        elif isinstance(node, ast.Subscript) and _name(node.value) == "Literal":
            words = _literal(node.slice)
            yield from map(str, words if isinstance(words, tuple) else (words,))


def _written(value: object) -> str | None:
    """Write a default as `--set` takes it; None where it is none that can be given."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or None
    return None if value is None else str(value)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _calls(tree: ast.AST, name: str) -> list[ast.Call]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _name(n.func) == name]


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _literal(node: ast.expr | None) -> object:
    """Return the value that an expression writes out, or its words where it computes one."""
    assert node is not None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
