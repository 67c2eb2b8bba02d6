"""Checks of what is installed: Python, packages and extras."""

import importlib
import importlib.metadata
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

from unipelt_cli.system.check import Check
from unipelt_cli.text import reason_with_type

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "unipelt"
NEEDED_EXTRA, UNSHOWN_EXTRAS = "demo", ("dev",)
MODULES = {"scikit-learn": "sklearn"}  # what is imported by another name than it is installed


def check_python() -> Iterator[Check]:
    """Look at the interpreter's version."""
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    ok = SpecifierSet(wanted).contains(platform.python_version(), prereleases=True)
    version = f"{platform.python_version()} on {platform.platform(terse=True)} ({wanted})"
    yield Check("python", ok, version, None if ok else f"use Python {wanted}", is_needed=True)


def check_packages() -> Iterator[Check]:
    """Compare each required package with its supported range, and import it."""
    from packaging.requirements import Requirement

    try:
        needed = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(DISTRIBUTION, False, "is not installed, only there", "pip install '.[demo]'")
        return
    for requirement in sorted(map(Requirement, needed), key=lambda each: each.name):
        if _holds(requirement, ""):
            yield _package(requirement)


def _holds(requirement: "Requirement", extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(requirement: "Requirement") -> Check:
    name, wanted = requirement.name, f"'{requirement.name}{requirement.specifier}'"
    version, problem = _version(requirement)
    if problem is not None:
        return Check(name, False, problem, f"pip install {wanted}", is_needed=True)
    try:
        if name == "transformers":
            from unipelt_cli.system import imports

            imports.transformers()
        else:
            importlib.import_module(MODULES.get(name, name))
    except Exception as error:
        problem = f"{version} cannot be imported ({reason_with_type(error)})"
        return Check(
            name, False, problem, f"pip install --force-reinstall {wanted}", is_needed=True
        )
    return Check(name, True, f"{version} ({requirement.specifier})", is_needed=True)


def _version(requirement: "Requirement") -> tuple[str, str | None]:
    """Return the version that is installed, and what is wrong with it."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return "", "is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return version, None
    return version, f"{version} is not in the supported range {requirement.specifier}"


def check_extras() -> Iterator[Check]:
    """Say of each extra whether its packages are there; none of them is imported."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    for extra in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        if extra in UNSHOWN_EXTRAS:
            continue
        extra_requirements = [
            requirement
            for requirement in requirements
            if _holds(requirement, extra) and not _holds(requirement, "")
        ]
        versions = {requirement.name: _version(requirement) for requirement in extra_requirements}
        problems = [f"{name} {problem}" for name, (_, problem) in versions.items() if problem]
        listed = ", ".join(f"{name} {version}" for name, (version, _) in versions.items())
        is_needed = extra == NEEDED_EXTRA
        if not problems:
            yield Check(f"extra {extra}", True, listed, is_needed=is_needed)
            continue
        is_there = any(version for version, problem in versions.values() if problem)
        remedy = f"pip install 'unipelt[{extra}]'"
        ok = False if is_needed or is_there else None
        yield Check(f"extra {extra}", ok, ", ".join(problems), remedy, is_needed)
