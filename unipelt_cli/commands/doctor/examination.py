"""All checks of an installation in their order, each guarded from what may break in it."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

from unipelt_cli.commands.doctor.installation import check_extras, check_packages, check_python
from unipelt_cli.commands.doctor.machine import (
    check_device,
    check_disk,
    check_memory,
    check_precision,
    check_processor,
    check_writable,
)
from unipelt_cli.commands.doctor.resources import check_data, check_hub, check_minilm, check_model
from unipelt_cli.errors import UnipeltError
from unipelt_cli.system import network
from unipelt_cli.system.check import Check
from unipelt_cli.text import reason_with_type


def examine(
    model: str | None, *, offline: bool, terminal: tuple[str, str | None]
) -> Iterator[Check]:
    """Look at everything, and at a backbone too if one is named; `terminal` was looked at before.

    The libraries are kept off the network: the hub's one short probe runs beside their imports.
    """
    answers = None if offline or network.is_offline() else network.probing()
    network.configure_network(offline=True, needed=False)
    packages = list(_guarded("packages", check_packages))
    broken = any(check.ok is False and check.is_needed for check in packages)
    yield from _guarded("python", check_python)
    yield from packages
    yield from _guarded("extras", check_extras)
    for what, section in (
        ("cpu", check_processor),
        ("device", check_device),
        ("precision", check_precision),
        ("memory", check_memory),
        ("backbone minilm", check_minilm),
        ("data", check_data),
    ):
        yield from _guarded(what, section, after_broken=broken)
    yield check_hub(answers)
    yield check_writable(
        "cache", network.caches()[0], "set HF_HOME to a folder that can be written"
    )
    yield check_writable(
        "runs/", Path("runs"), "go to another directory, or give --out", needed=True
    )
    yield from _guarded("disk", check_disk)
    yield Check("terminal", True, *terminal)
    if importlib.util.find_spec("kernels") is not None:
        warning = "is installed: transformers may fetch and run code with it"
        yield Check("kernels", False, warning, "pip uninstall kernels")
    if model is not None:
        name = f"backbone {model}"
        yield from _guarded(name, lambda: check_model(model), after_broken=broken)


def _guarded(
    what: str, section: Callable[[], Iterator[Check]], *, after_broken: bool = False
) -> Iterator[Check]:
    """Yield a section's checks; what it raises is one that failed.

    Where a package is broken already, that is said above, and this one could not be checked.
    """
    try:
        yield from section()
    except UnipeltError as error:
        yield Check(what, False, error.message, error.hint, is_needed=True)
    except Exception as error:
        if after_broken:
            yield Check(what, None, "not checked: a package above is broken")
        else:
            yield Check(
                what, False, reason_with_type(error), "mend the packages above", is_needed=True
            )
