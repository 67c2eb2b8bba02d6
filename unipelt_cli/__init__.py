"""Fine-tune pretrained encoders on few labelled examples with gated submodules."""

from typing import TYPE_CHECKING, Any

from unipelt_cli.version import __version__

if TYPE_CHECKING:
    from unipelt_cli.runs.loaded_runs import LoadedRun, LoadedRuns, Prediction, load_run, load_runs

__all__ = ["LoadedRun", "LoadedRuns", "Prediction", "__version__", "load_run", "load_runs"]


def __getattr__(name: str) -> Any:
    """Import what labels rows when it is asked for: most who import this start a command."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unipelt_cli.system import imports

    with imports.importing():
        from unipelt_cli.runs import loaded_runs

    return getattr(loaded_runs, name)
