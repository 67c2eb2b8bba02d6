"""Other values in place of the backbone's own tensors, and few entries chosen among many.

What a forward pass sees is computed from frozen tensors and what trains, so that nothing else can
move: no weight decay, no moment of the optimiser reaches an entry that was not chosen.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn


class Entries(nn.Module):
    """A fixed number K of entries of some tensors: sorted places in their flat concatenation."""

    places: Tensor  # (K,) int32

    def __init__(self, tensors: Sequence[Tensor], count: int) -> None:
        super().__init__()
        self.sizes = [tensor.numel() for tensor in tensors]
        assert 0 < count <= self.total < 2**31, f"{count} of {self.total} places in int32"
        places = torch.arange(count, dtype=torch.int32, device=tensors[0].device)
        self.register_buffer("places", places)
        self._split_of: tuple[Tensor | None, int] = None, 0
        self._split: list[Tensor] = []

    @property
    def total(self) -> int:
        """How many entries there are to choose from."""
        return sum(self.sizes)

    def choose(self, places: Tensor) -> None:
        """Take these places, sorted, in place of the present ones."""
        self.places.copy_(places)

    def split(self) -> list[Tensor]:
        """Return the places in each tensor, int64; they are worked out again when they change."""
        known, version = self._split_of
        if known is not self.places or version != self.places._version:
            with torch.inference_mode(False):  # training meets what an evaluation worked out
                self._split = self._find_split()
            self._split_of = self.places, self.places._version
        return self._split

    def _find_split(self) -> list[Tensor]:
        starts = torch.tensor([0, *accumulate(self.sizes)], dtype=torch.int32)
        borders = torch.searchsorted(self.places, starts.to(self.places.device)).tolist()
        return [
            self.places[begin:end].long() - int(start)
            for start, begin, end in zip(starts[:-1], borders, borders[1:], strict=False)
        ]


class Overlay(nn.Module):
    """Lets every forward pass of a backbone see computed tensors in place of its own.

    An attribute of the module hides the parameter of the same name while the pass lasts: the
    parameter, its name and the state stay as they are.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.own = list(parameters.values())
        self.handles: list[Any] = []
        self.hiding: list[tuple[nn.Module, str]] = []

    def weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the tensors that change, each with what the pass sees in its place."""
        yield from ()

    def lay_over(self, backbone: nn.Module) -> None:
        """Begin: the backbone's next pass sees the computed tensors."""
        self.owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in backbone.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:  # a tied tensor has several owners
                    self.owners.setdefault(parameter, []).append((module, name))
        self.handles = [
            backbone.register_forward_pre_hook(self._show),
            backbone.register_forward_hook(self._hide, always_call=True),
        ]

    def lift(self) -> None:
        """End: the backbone's passes see its own tensors again."""
        for handle in self.handles:
            handle.remove()

    def merge(self) -> None:
        """Write what a pass sees into the backbone's own tensors, and end."""
        with torch.no_grad():
            for parameter, weight in self.weights():
                parameter.copy_(weight)
        self.lift()

    def _show(self, backbone: nn.Module, args: Any) -> None:
        for parameter, weight in self.weights():
            for module, name in self.owners[parameter]:
                module.__dict__[name] = weight
                self.hiding.append((module, name))

    def _hide(self, backbone: nn.Module, args: Any, output: Any) -> None:
        while self.hiding:
            module, name = self.hiding.pop()
            del module.__dict__[name]


class Deltas(Overlay):
    """Chosen entries of a backbone, each with what is added to it; all other entries are frozen.

    An entry is always the pretrained value + delta, never a sum that was kept: so places and
    deltas say it to the bit.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], count: int) -> None:
        super().__init__(parameters)
        self.entries = Entries(self.own, count)
        self.deltas = nn.Parameter(torch.zeros(count, device=self.own[0].device))  # (K,)

    def weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        places = self.entries.split()
        deltas = torch.split(self.deltas, [len(chosen) for chosen in places])
        for parameter, chosen, delta in zip(self.own, places, deltas, strict=True):
            if len(chosen):
                yield parameter, parameter.flatten().index_add(0, chosen, delta).view_as(parameter)

    def stored(self) -> dict[str, Tensor]:
        """Return places and deltas, by their names in this module."""
        return {"entries.places": self.entries.places, "deltas": self.deltas.detach()}

    def load(self, places: Tensor, deltas: Tensor) -> None:
        """Take up what `stored` returned."""
        with torch.no_grad():
            self.entries.choose(places)
            self.deltas.copy_(deltas)


def frozen(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Return what a method may change, by name: what already trains belongs to the head."""
    return {n: p for n, p in backbone.named_parameters() if not p.requires_grad}


def top(scores: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest scores, sorted; of equal ones the first win."""
    border = scores.topk(count, sorted=False).values.min()
    chosen = scores > border
    level = (scores == border).nonzero()[:, 0]
    chosen[level[: count - int(chosen.sum())]] = True
    return chosen.nonzero()[:, 0].int()


def squared_gradients(
    tensors: Sequence[nn.Parameter], losses: Iterable[Tensor], clip: float | None = None
) -> Tensor:
    """Return the mean over losses of each entry's squared gradient, in one flat tensor.

    With `clip` no tensor's gradient is longer than that.
    """
    trained = [tensor.requires_grad for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_(True)
    sums = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors]
    count = 0
    for loss in losses:
        count += 1
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                norm = float(gradient.norm()) if clip is not None else 0.0
                scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
                total.addcmul_(gradient, gradient, value=scale * scale)
    for tensor, was in zip(tensors, trained, strict=True):
        tensor.requires_grad_(was)
    return torch.cat([total.flatten() for total in sums]).div_(max(1, count))
