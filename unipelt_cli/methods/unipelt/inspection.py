"""Looking into a union's forward pass: its gates recorded, some of its submodules closed."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn

from unipelt_cli.methods.unipelt.container import Container
from unipelt_cli.methods.unipelt.layer import LayerSubmodules


@contextmanager
def record_gates(backbone: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """Collect the gates of the latest forward pass: a list by layer of {gate: (batch,) values}.

    A module that serves several layers has an entry for each. The list, or its entries, stay empty
    when the backbone has no gates. Values stay on the device, float32.
    """
    container = getattr(backbone, "submodules", None)
    recorded: list[dict[str, Tensor]] = []
    if not isinstance(container, Container):
        yield recorded
        return
    container.state.recorded = recorded
    try:
        yield recorded
    finally:
        container.state.recorded = None


def places(backbone: nn.Module) -> list[tuple[int, str]]:
    """Return every (layer, part) of a union, which `closed` can close; () for what is no union."""
    container = getattr(backbone, "submodules", None)
    if not isinstance(container, Container):
        return []
    return [
        (layer, part)
        for layer, submodules in enumerate(container.layers)
        for part in cast(LayerSubmodules, submodules).parts
    ]


@contextmanager
def closed(backbone: nn.Module, places: Collection[tuple[int, str]]) -> Iterator[None]:
    """Inside, some submodules of a union rest: each (layer, part) is as if it were not there.

    A prefix is not zero rows then, which would still take attention, but none.
    """
    state = container_of(backbone).state
    before, state.closed = state.closed, state.closed.union(places)
    try:
        yield
    finally:
        state.closed = before


def container_of(backbone: nn.Module) -> Container:
    """Return the submodules of a backbone that a union was attached to."""
    container = backbone.submodules
    assert isinstance(container, Container)
    return container
