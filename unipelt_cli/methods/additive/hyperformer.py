"""Adapters for every task and layer, made by one hypernetwork from embeddings of both.

HyperFormer++, Karimi Mahabadi et al. 2021 (arXiv 2106.04489), as its authors' code has it: in
place of an embedding of the position, attention and feed-forward block have generators each.
Shapes: batch B, tokens T, hidden D, bottleneck M, layers N, embedding E.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import CHECKS, Method, Recipe, Site, refuse_unusual_layers
from unipelt_cli.methods.building_blocks import STD, new_linear

GENERATED_STD = 0.01  # of the hypernetwork's matrices
EPSILON = 1e-6  # of its norms
PLACES = ("attention", "output")
Weights = Mapping[str, Tensor]  # "attention-down_weight" and so on: (N, numbers)


class HyperNetwork(nn.Module):
    """Embeddings of tasks and layers through an MLP and a norm, then a linear unit a tensor."""

    def __init__(
        self,
        sizes: Mapping[str, int],  # what is generated for one layer
        counts: tuple[int, int],  # tasks, layers
        widths: tuple[int, int],  # E and the MLP's
        generator: Generator,
    ) -> None:
        super().__init__()
        (tasks, layers), (embedding, width) = counts, widths
        # A vector each, so that a batch of one task leaves the others without a gradient.
        self.tasks = nn.ParameterList(
            nn.Parameter(torch.empty(embedding).normal_(generator=generator)) for _ in range(tasks)
        )
        self.layers = nn.Parameter(torch.empty(layers, embedding).normal_(generator=generator))
        self.down = _generator_linear(2 * embedding, width, generator)
        self.up = _generator_linear(width, embedding, generator)
        self.norm = nn.LayerNorm(embedding, EPSILON)
        self.generators = nn.ModuleDict(
            {name: _generator_linear(embedding, size, generator) for name, size in sizes.items()}
        )

    def embed(self, task: int) -> Tensor:  # (N, E)
        """Return what the generators read: one vector for each layer."""
        pairs = torch.cat([self.tasks[task].expand_as(self.layers), self.layers], dim=1)
        embedded: Tensor = self.norm(self.up(self.down(pairs).relu()))
        return embedded

    def forward(self, task: int) -> Weights:
        embedded = self.embed(task)
        return {name: generator(embedded) for name, generator in self.generators.items()}


class Table(nn.Module):
    """What a hypernetwork generated, for every task: the stored form where it is smaller."""

    def __init__(self, sizes: Mapping[str, int], counts: tuple[int, int]) -> None:
        super().__init__()
        self.rows = nn.ParameterDict()
        for name, size in sizes.items():  # one by one: from a mapping they would be sorted
            self.rows[name] = nn.Parameter(torch.zeros(*counts, size))

    def forward(self, task: int) -> Weights:
        return {name: rows[task] for name, rows in self.rows.items()}


class HyperAdapters(nn.Module):
    """The adapters of a backbone, `backbone.hyperformer`: hooks after both blocks of a layer.

    In evaluation a task's weights are made once and kept until the module's mode is set anew.
    """

    def __init__(self, backbone: nn.Module, method: "HyperFormer", site: Site) -> None:
        super().__init__()
        layout = site.layout
        layers = layout.layer_list(backbone)
        output = layers[0].get_submodule(layout.output)
        assert isinstance(output, nn.Linear)
        self.sizes = method.sizes(output.out_features)
        self.counts = (site.tasks, len(layers))
        network = HyperNetwork(
            self.sizes, self.counts, (method.embedding, method.width), site.generator
        )
        trained = sum(parameter.numel() for parameter in network.parameters())
        self.is_smaller_as_table = site.tasks * len(layers) * sum(self.sizes.values()) < trained
        as_table = site.folded and self.is_smaller_as_table
        self.source: nn.Module = Table(self.sizes, self.counts) if as_table else network
        self.task = 0
        self.current: Weights = {}
        self.kept: dict[int, Weights] = {}
        backbone.register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, layer in enumerate(layers):
            for place in PLACES:
                module = layer.get_submodule(_path(layout, place))
                module.register_forward_hook(partial(self._adapt, place, index))

    def train(self, mode: bool = True) -> "HyperAdapters":
        self.kept = {}
        return super().train(mode)

    def _begin(self, backbone: nn.Module, args: Any, kwargs: Any) -> None:
        if self.training or torch.is_grad_enabled():
            self.current = self.source(self.task)
            return
        if self.task not in self.kept:
            self.kept[self.task] = self.source(self.task)
        self.current = self.kept[self.task]

    def _adapt(
        self, place: str, index: int, module: nn.Module, args: Any, output: Tensor
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        hidden = output.shape[-1]

        def of(name: str, *shape: int) -> Tensor:
            return self.current[f"{place}-{name}"][index].view(*shape).to(output.dtype)

        low = functional.linear(output, of("down_weight", -1, hidden), of("down_bias", -1))
        up = functional.linear(functional.gelu(low), of("up_weight", hidden, -1), of("up_bias", -1))
        scale, shift = of("norm_scale", -1), of("norm_shift", -1)
        return output + functional.layer_norm(up, (hidden,), scale, shift, EPSILON)


@dataclass(frozen=True, config=CHECKS)
class HyperFormer(Method):
    """One hypernetwork makes the adapters of all tasks and layers."""

    reduction: Annotated[int, Field(ge=1, description="hidden size over bottleneck")] = 32
    embedding: Annotated[int, Field(ge=1, description="numbers that embed a task or a layer")] = 64
    width: Annotated[int, Field(ge=1, description="width of the MLP over both")] = 128

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)

    def sizes(self, hidden: int) -> dict[str, int]:
        """Return how many numbers are generated for one layer, by name."""
        bottleneck = max(1, hidden // self.reduction)
        one = {
            "down_weight": bottleneck * hidden,
            "down_bias": bottleneck,
            "up_weight": hidden * bottleneck,
            "up_bias": hidden,
            "norm_scale": hidden,
            "norm_shift": hidden,
        }
        return {f"{place}-{name}": size for place in PLACES for name, size in one.items()}

    def attach(self, backbone: nn.Module, site: Site) -> None:
        backbone.hyperformer = HyperAdapters(backbone, self, site)

    def select(self, backbone: nn.Module, task: int) -> None:
        _adapters(backbone).task = task

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return the generated weights of all tasks, or the hypernetwork where it is smaller."""
        adapters = _adapters(backbone)
        stored = super().fold(backbone)
        if isinstance(adapters.source, Table) or not adapters.is_smaller_as_table:
            return stored
        with torch.no_grad():
            made = [adapters.source(task) for task in range(adapters.counts[0])]
        own = {name: t for name, t in stored.items() if not name.startswith("hyperformer.")}
        return own | {
            f"hyperformer.source.rows.{name}": torch.stack([weights[name] for weights in made])
            for name in adapters.sizes
        }


def _generator_linear(inputs: int, outputs: int, generator: Generator) -> nn.Linear:
    linear = new_linear(inputs, outputs, generator)
    with torch.no_grad():
        linear.weight.mul_(GENERATED_STD / STD)
    return linear


def _path(layout: Layout, place: str) -> str:
    return layout.attention_output if place == "attention" else layout.output


def _adapters(backbone: nn.Module) -> HyperAdapters:
    adapters = backbone.hyperformer
    assert isinstance(adapters, HyperAdapters)
    return adapters


METHODS = MappingProxyType(
    {
        "hyperformer": Recipe(
            HyperFormer(),
            1e-4,
            "additive",
            "a network that makes the adapters of every task and layer",
            "Karimi Mahabadi et al. 2021",
        ),
    }
)
