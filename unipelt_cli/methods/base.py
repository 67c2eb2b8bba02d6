"""What a method is: frozen hyperparameters and a few operations on a backbone.

After `attach`, `requires_grad` alone says what trains. The other operations have defaults, so
that most methods are hyperparameters and one function.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Generator, Tensor, nn

from unipelt_cli.backbones import Layout

CHECKS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
STD = 0.02


@checked_dataclass(frozen=True, config=CHECKS)
class Method:
    """Base of all methods: the hyperparameters are the fields of the subclass."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (what is wrong, what to do) for fields that contradict each other."""
        yield from ()

    @property
    def pads_to_max_length(self) -> bool:
        """Whether a row's result depends on padding, so that all rows must be padded alike."""
        return False

    def attach(
        self, backbone: nn.Module, layout: Layout, generator: Generator, *, folded: bool = False
    ) -> None:
        """Change a backbone whose parameters are all frozen, and mark what trains.

        With `folded` the backbone gets the form that is stored. Randomness comes from
        `generator` alone.
        """
        raise TypeError(f"{type(self).__name__} does not say how it attaches")

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return what is stored: the trained tensors under their names in the folded form."""
        return {
            name: parameter.detach()
            for name, parameter in backbone.named_parameters()
            if parameter.requires_grad
        }

    def merge(self, backbone: nn.Module) -> None:
        """Fold everything into the backbone's own tensors, exactly.

        Raises CannotMerge with the reason where no plain backbone computes the same function.
        """


def initialise(linear: nn.Linear, generator: Generator) -> None:
    """Draw a linear unit N(0, 0.02) with zero bias, never from the global generator."""
    nn.init.normal_(linear.weight, 0.0, STD, generator=generator)
    nn.init.zeros_(linear.bias)


def new_linear(inputs: int, outputs: int, generator: Generator) -> nn.Linear:
    """Make a linear unit N(0, 0.02) with zero bias."""
    linear = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    initialise(linear, generator)
    return linear


class CannotMerge(Exception):
    """No plain backbone computes what this method computes; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """One entry of the table of methods."""

    method: Method
    learning_rate: float
    summary: str
    source: str
