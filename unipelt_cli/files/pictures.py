"""Pictures written whole or not at all, and what they have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from unipelt_cli.errors import ConfigError
from unipelt_cli.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
MARKERS = "osD^vP*X"


def check_ending(path: Path) -> None:
    """Raise ConfigError for a file whose ending names no picture."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"--plot {str(path)!r}: no such format", f"give a path ending in {', '.join(FORMATS)}"
        )


@contextmanager
def new_figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """Give a figure to draw in; it is written whole, or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(width, height), layout="constrained")
    try:
        yield figure
        with atomic.replacing(path) as temporary:
            figure.savefig(temporary, dpi=150)
    finally:
        pyplot.close(figure)
