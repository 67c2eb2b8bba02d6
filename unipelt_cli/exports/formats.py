"""The table of export formats, which help and errors read without waiting for what writes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from unipelt_cli.errors import ConfigError, nearest


@dataclass(frozen=True)
class Target:
    """One format: the module beside this one whose `plan` writes it, and what that needs."""

    module: str
    summary: str
    library: str = ""
    """What the hub calls the library that loads it."""
    packages: tuple[str, ...] = ()
    extra: str = ""
    """The extra of this package that brings them."""
    holds: frozenset[str] | None = None
    """The parts of an ungated union that it can hold; None where it holds all."""
    needs_library_head: bool = False
    """Whether it holds heads of the transformers library alone."""
    has_parts: bool = False
    """Whether it takes one part of a union alone."""
    has_half: bool = False
    """Whether it takes float16."""

    @property
    def plan(self) -> Callable[..., Any]:
        """From a `job.Job` to the function that writes; imports what that needs."""
        plan: Callable[..., Any] = import_module(f"unipelt_cli.exports.{self.module}").plan
        return plan


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "adapters": Target(
            "adapters_folder",
            "a folder that adapters loads beside the backbone",
            "adapter-transformers",
        ),
        "peft": Target(
            "peft_folder",
            "a folder that PEFT loads beside the backbone",
            "peft",
            ("peft",),
            "peft",
            holds=frozenset({"lora"}),
            has_parts=True,
        ),
        "hf": Target(
            "transformers_model",
            "a whole classifier of the transformers library",
            "transformers",
            holds=frozenset({"lora", "bias"}),
            needs_library_head=True,
        ),
        "onnx": Target(
            "onnx_model",
            "a whole model that ONNX Runtime runs without PyTorch",
            packages=("onnx", "onnxruntime"),
            extra="onnx",
            has_half=True,
        ),
    }
)


def get(name: str) -> Target:
    """Return a format; raise ConfigError for an unknown one, or without the packages it needs."""
    if name not in TARGETS:
        raise ConfigError(f"--to {name!r}: no such format", nearest(name, TARGETS))
    target = TARGETS[name]
    for package in target.packages:
        if find_spec(package) is None:
            raise ConfigError(
                f"--to {name}: the package {package} is not installed",
                f"pip install 'unipelt[{target.extra}]'",
            )
    return target


def only(name: str, flag: str, has: Callable[[Target], bool]) -> None:
    """Raise ConfigError for a flag that a format does not take."""
    takes = [other for other, target in TARGETS.items() if has(target)]
    if name not in takes:
        raise ConfigError(f"{flag}: not for --to {name}", f"drop it, or use --to {takes[0]}")
