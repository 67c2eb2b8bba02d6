"""Weight updates of low rank beyond LoRA: DoRA and VeRA, each merged exactly.

An update stands beside one linear unit of the backbone and changes its output through a forward
hook. Shapes: outputs O, inputs I, rank R; a weight is (O, I).
"""

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import CHECKS, AttachContext, Method, Recipe, refuse_unusual_layers


class Update(nn.Module):
    """A change of one linear unit's weight, as the hook on that unit."""

    def changed(self, x: Tensor, output: Tensor, linear: nn.Linear) -> Tensor:
        """Return the unit's output under the changed weight, given its output without."""
        raise TypeError(f"{type(self).__name__} does not say what it changes")

    def merged(self, weight: Tensor) -> Tensor:
        """Return the changed weight (O, I) in float32."""
        raise TypeError(f"{type(self).__name__} does not say what it changes")

    def hook(self, linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Stand behind the linear unit: the forward hook."""
        assert isinstance(linear, nn.Linear)
        return self.changed(args[0], output, linear)


class Updates(nn.Module):
    """All updates of a backbone, by layer and place: `backbone.updates`."""

    def __init__(
        self,
        backbone: nn.Module,
        layout: Layout,
        places: tuple[str, ...],
        make: Callable[[nn.Linear], Update],
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.pairs: list[tuple[nn.Linear, Update]] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        for layer in layout.layer_list(backbone):
            updates = nn.ModuleDict()
            for projection in places:
                linear = layer.get_submodule(getattr(layout, projection))
                assert isinstance(linear, nn.Linear)
                update = updates[projection] = make(linear)
                self.pairs.append((linear, update))
                self.handles.append(linear.register_forward_hook(update.hook))
            self.layers.append(updates)

    def __iter__(self) -> Iterator[Update]:
        return (update for _, update in self.pairs)


def updates_of(backbone: nn.Module) -> Updates:
    """Return the updates that a reparameterised backbone carries."""
    updates = backbone.updates
    assert isinstance(updates, Updates)
    return updates


@dataclass(frozen=True, config=CHECKS)
class Reparameterised(Method):
    """Base of the methods that change weights by updates, which merging adds for good."""

    def refusals(self, layout: Layout, config: object) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)

    @property
    def unmergeable(self) -> None:
        return None

    def merge(self, backbone: nn.Module) -> None:
        """Put every changed weight in the place of the one it changes, in float32."""
        updates = updates_of(backbone)
        with torch.no_grad():
            for linear, update in updates.pairs:
                linear.weight.copy_(update.merged(linear.weight))
        for handle in updates.handles:
            handle.remove()
        del backbone.updates


class Directed(Update):
    """DoRA: W' = m (W + s BA) / ||W + s BA||, one magnitude and one norm for each output.

    The norm is a constant in the backward pass; the bias is not rescaled.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: Generator) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5, generator=generator)
        self.magnitude = nn.Parameter(_row_norms(linear.weight.detach().float()))

    def direction(self, weight: Tensor) -> Tensor:
        """Return W + s BA (O, I), of which only the direction of each row counts."""
        direction: Tensor = weight.float() + self.scale * self.b @ self.a
        return direction

    def changed(self, x: Tensor, output: Tensor, linear: nn.Linear) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            norm = _row_norms(self.direction(linear.weight))
        factor = (self.magnitude / norm).to(x.dtype)
        low = functional.linear(x, self.a.to(x.dtype)) * self.scale
        output = factor * (output + functional.linear(low, self.b.to(x.dtype)))
        if linear.bias is None:
            return output
        return output + (1 - factor) * linear.bias

    def merged(self, weight: Tensor) -> Tensor:
        direction = self.direction(weight)
        return (self.magnitude / _row_norms(direction))[:, None] * direction


@dataclass(frozen=True, config=CHECKS)
class DoRA(Reparameterised):
    """LoRA on the direction of each output's weights, and a learned magnitude (Liu et al. 2024).

    Ours rather than the `adapters` library's, which rescales the bias too.
    """

    rank: Annotated[int, Field(ge=1, le=1024, description="rank of the direction's update")] = 8
    scale: Annotated[float, Field(gt=0, description="alpha / rank")] = 2.0

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone.updates = Updates(
            backbone,
            site.layout,
            ("query", "value"),
            lambda linear: Directed(linear, self.rank, self.scale, site.generator),
        )


class Shared(nn.Module):
    """VeRA's frozen random matrices, one pair for the whole backbone, never stored."""

    def __init__(self, outputs: int, inputs: int, rank: int, generator: Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs), requires_grad=False)
        self.b = nn.Parameter(torch.empty(outputs, rank), requires_grad=False)
        for matrix in (self.a, self.b):
            nn.init.kaiming_uniform_(matrix, generator=generator)


class Scaled(Update):
    """VeRA: x -> ((x A^T) * d) B^T * b; A and B are shared and frozen, only d and b train."""

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = [shared]  # in a list: its tensors are the container's, not this update's
        self.d = nn.Parameter(torch.full((shared.a.shape[0],), 0.1))
        self.b = nn.Parameter(torch.zeros(shared.b.shape[0]))

    def changed(self, x: Tensor, output: Tensor, linear: nn.Linear) -> Tensor:
        low = functional.linear(x, self.shared[0].a.to(x.dtype)) * self.d.to(x.dtype)
        return output + functional.linear(low, self.shared[0].b.to(x.dtype)) * self.b.to(x.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        shared = self.shared[0]
        return weight.float() + self.b[:, None] * ((shared.b * self.d) @ shared.a)


@dataclass(frozen=True, config=CHECKS)
class VeRA(Reparameterised):
    """Vectors that scale random matrices shared by all layers (Kopiczko et al. 2024).

    The matrices are drawn again from the run's seed whenever the model is built. Ours rather than
    the `adapters` library's, whose d and b are dense matrices.
    """

    rank: Annotated[int, Field(ge=1, le=4096, description="rank of the shared matrices")] = 256

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        layers = site.layout.layer_list(backbone)
        query = layers[0].get_submodule(site.layout.query)
        assert isinstance(query, nn.Linear)
        shared = Shared(query.out_features, query.in_features, self.rank, site.generator)
        updates = Updates(backbone, site.layout, ("query", "value"), lambda linear: Scaled(shared))
        updates.shared = shared
        backbone.updates = updates


def _row_norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return norms


METHODS = MappingProxyType(
    {
        "dora": Recipe(
            DoRA(),
            5e-4,
            "reparameterised",
            "low-rank updates of the direction of query and value, learned magnitudes",
            "Liu et al. 2024",
        ),
        "vera": Recipe(
            VeRA(),
            1e-2,
            "reparameterised",
            "two vectors a projection that scale random matrices shared by all layers",
            "Kopiczko et al. 2024",
        ),
    }
)
