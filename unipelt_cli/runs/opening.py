"""A finished run by its directory or its place on the hub: the one way in, for commands and Python.

The libraries read the hub's offline switches when they are imported, and a run's settings say
whether the hub is needed: nothing here imports one of them before the settings are read.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from unipelt_cli.runs import hub
from unipelt_cli.runs.names import EXPERIMENT
from unipelt_cli.system import network
from unipelt_cli.system.imports import importing

if TYPE_CHECKING:
    from unipelt_cli.config.experiment import Experiment
    from unipelt_cli.config.recorded import RecordedExperiment
    from unipelt_cli.runs.run import Run


def open_run(
    name: str | Path,
    *,
    offline: bool,
    source: str | None = None,
    model: str | None = None,
    needs_rows: bool = True,
    is_guest: bool = False,
) -> "Run":
    """Fetch a run that is on the hub, settle whether the network is used, and read the run.

    `source` and `model` say where its rows and its backbone are now; `needs_rows`, whether its own
    rows will be read; see `settle_network` for `is_guest`. Raises RunError for a run that is
    absent, unfinished, damaged or newer, and DataError or BackboneError for what only the hub has
    where it cannot be asked.
    """
    directory = hub.directory_of(name, offline=offline)
    recorded = settle_run(
        directory,
        offline=offline,
        source=source,
        model=model,
        needs_rows=needs_rows,
        is_guest=is_guest,
    )
    with importing():
        from unipelt_cli.runs.run import read_run
    return read_run(directory, recorded)


def settle_run(
    directory: Path,
    *,
    offline: bool,
    source: str | None = None,
    model: str | None = None,
    needs_rows: bool = True,
    is_guest: bool = False,
) -> "RecordedExperiment | None":
    """Settle whether the network is used for a run, and return what it says of itself, if any."""
    path = directory / EXPERIMENT
    if not path.is_file():
        return None
    with importing():
        from unipelt_cli.config.recorded import read_recorded
    recorded = read_recorded(path)
    moved = recorded.experiment.moved(source, model)
    settle_network([moved], offline=offline, needs_rows=needs_rows, is_guest=is_guest)
    return recorded


def settle_network(
    experiments: Iterable["Experiment"],
    *,
    offline: bool,
    needs_rows: bool = True,
    needs_backbone: bool = True,
    is_guest: bool = False,
) -> None:
    """Decide about the network before any hub library is imported.

    In somebody else's program, as `is_guest`, the libraries are imported already, what is in the
    local cache is taken from there, and the switches stay as they are where nothing is needed.
    """
    from unipelt_cli import tasks

    needs: set[tuple[str | None, str | None]] = set()
    for experiment in experiments:
        data, backbone = experiment.data, experiment.model.backbone
        dataset = data.dataset or (tasks.HUB_GLUE if data.source == "hub" else None)
        is_here = not network.names_hub(backbone) or (is_guest and _is_cached(backbone))
        asked = backbone if needs_backbone and not is_here else None
        needs.add((dataset if needs_rows else None, asked))
    needed = any(map(any, needs))
    if needed or not is_guest:
        network.configure_network(offline=offline, needed=needed)
    for hub_rows, hub_model in sorted(needs, key=str):
        dataset = hub_rows and hub_rows.partition(":")[0]
        network.require_cached(backbone=hub_model, dataset=dataset)


def _is_cached(backbone: str) -> bool:
    from unipelt_cli.backbones import pretrained

    return pretrained.cached(backbone) is not None
