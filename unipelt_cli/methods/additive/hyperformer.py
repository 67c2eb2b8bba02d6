"""Adapters for every task, layer and block, made by one hypernetwork from embeddings of these.

HyperFormer++, Karimi Mahabadi et al. 2021 (arXiv 2106.04489), and the variant of its authors' code
whose blocks have generators each. Shapes: batch B, tokens T, hidden D, bottleneck M, layers N,
embedding E.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Method,
    Published,
    Recipe,
    refuse_unusual_layers,
)
from unipelt_cli.methods.building_blocks import STD, new_linear, train_norms

GENERATED_STD = 0.01  # of the hypernetwork's matrices
EPSILON = 1e-6  # of its norms
PLACES = ("attention", "output")
Weights = Mapping[str, Tensor]  # "attention-down_weight" and so on: (N, numbers)


class HyperNetwork(nn.Module):
    """Embeddings of tasks, layers and blocks through an MLP and a norm, then a unit a tensor.

    The blocks share the units and have an embedding each, or else have units each.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],  # what is generated for one adapter
        counts: tuple[int, int],  # tasks, layers
        widths: tuple[int, int],  # E and the MLP's
        shared: bool,
        generator: Generator,
    ) -> None:
        super().__init__()
        (tasks, layers), (embedding, width) = counts, widths
        self.sizes, self.shared = sizes, shared
        # A vector each, so that a batch of one task leaves the others without a gradient.
        self.tasks = nn.ParameterList(
            nn.Parameter(torch.empty(embedding).normal_(generator=generator)) for _ in range(tasks)
        )
        self.layers = nn.Parameter(torch.empty(layers, embedding).normal_(generator=generator))
        if shared:
            blocks = torch.empty(len(PLACES), embedding)
            self.blocks = nn.Parameter(blocks.normal_(generator=generator))
        self.down = _generator_linear((3 if shared else 2) * embedding, width, generator)
        self.up = _generator_linear(width, embedding, generator)
        self.norm = nn.LayerNorm(embedding, EPSILON)
        generated = sizes if shared else at_each_place(sizes)
        self.generators = nn.ModuleDict(
            {n: _generator_linear(embedding, size, generator) for n, size in generated.items()}
        )

    def embed(self, task: int, block: str) -> Tensor:  # (N, E)
        """Return what the generators read: one vector for each layer."""
        vectors = [self.tasks[task].expand_as(self.layers), self.layers]
        if self.shared:
            vectors.append(self.blocks[PLACES.index(block)].expand_as(self.layers))
        embedded: Tensor = self.norm(self.up(self.down(torch.cat(vectors, dim=1)).relu()))
        return embedded

    def forward(self, task: int) -> Weights:
        made = {}
        for block in PLACES:
            embedded = self.embed(task, block)
            for name in self.sizes:
                key = f"{block}-{name}"
                made[key] = self.generators[name if self.shared else key](embedded)
        return made


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

    def __init__(self, backbone: nn.Module, method: "HyperFormer", site: AttachContext) -> None:
        super().__init__()
        layout = site.layout
        layers = layout.layer_list(backbone)
        output = layers[0].get_submodule(layout.output)
        assert isinstance(output, nn.Linear)
        sizes = method.sizes(output.out_features)
        self.sizes = at_each_place(sizes)
        self.counts = (site.tasks, len(layers))
        widths, shared = (method.embedding, method.width), method.generators == "shared"
        network = HyperNetwork(sizes, self.counts, widths, shared, site.generator)
        trained = sum(parameter.numel() for parameter in network.parameters())
        self.is_smaller_as_table = site.tasks * len(layers) * sum(self.sizes.values()) < trained
        as_table = site.folded and self.is_smaller_as_table
        self.source: nn.Module = Table(self.sizes, self.counts) if as_table else network
        self.task = 0
        self.current: Weights = {}
        self.kept: dict[int, Weights] = {}
        backbone.register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, layer in enumerate(layers):
            for block in PLACES:
                module = layer.get_submodule(_path(layout, block))
                module.register_forward_hook(partial(self._adapt, block, index))

    def train(self, mode: bool = True) -> "HyperAdapters":
        self.kept = {}
        return super().train(mode)

    def _begin(self, backbone: nn.Module, args: Any, kwargs: Any) -> None:
        if self.training or torch.is_grad_enabled():
            self.current = self._made()
            return
        if self.task not in self.kept:
            self.kept[self.task] = self._made()
        self.current = self.kept[self.task]

    def _made(self) -> Weights:
        """Return the current task's weights in float32, as they are stored."""
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            made: Weights = self.source(self.task)
        return made

    def _adapt(
        self, block: str, index: int, module: nn.Module, args: Any, output: Tensor
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        hidden = output.shape[-1]

        def of(name: str, *shape: int) -> Tensor:
            return self.current[f"{block}-{name}"][index].view(*shape).to(output.dtype)

        low = functional.linear(output, of("down_weight", -1, hidden), of("down_bias", -1))
        up = functional.linear(functional.gelu(low), of("up_weight", hidden, -1), of("up_bias", -1))
        scale, shift = of("norm_scale", -1), of("norm_shift", -1)
        return output + functional.layer_norm(up, (hidden,), scale, shift, EPSILON)


@dataclass(frozen=True, config=CHECKS)
class HyperFormer(Method):
    """One hypernetwork makes the adapters of all tasks, layers and blocks; all layer norms train.

    Paper and release's `hyperformer++.json`: generators shared by the two blocks, which an
    embedding tells apart, and trained norms. The release's `hyperformer.json`: "per_block".
    """

    reduction: Annotated[int, Field(ge=1, description="hidden size over bottleneck")] = 32
    embedding: Annotated[int, Field(ge=1, description="numbers that embed a task or a layer")] = 64
    width: Annotated[int, Field(ge=1, description="width of the MLP over all of them")] = 128
    generators: Annotated[
        Literal["shared", "per_block"],
        Field(description="one set for attention and feed-forward block (++), or one for each"),
    ] = "shared"
    train_layer_norms: Annotated[
        bool, Field(description="whether the backbone's layer norms train too")
    ] = True

    @property
    def earlier(self) -> Mapping[str, Any]:
        return {"generators": "per_block", "train_layer_norms": False}

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)

    def sizes(self, hidden: int) -> dict[str, int]:
        """Return how many numbers are generated for one adapter, by name."""
        bottleneck = max(1, hidden // self.reduction)
        return {
            "down_weight": bottleneck * hidden,
            "down_bias": bottleneck,
            "up_weight": hidden * bottleneck,
            "up_bias": hidden,
            "norm_scale": hidden,
            "norm_shift": hidden,
        }

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone.hyperformer = HyperAdapters(backbone, self, site)
        if self.train_layer_norms:
            train_norms(backbone, site.layout)

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
        others = {name: t for name, t in stored.items() if not name.startswith("hyperformer.")}
        return others | {
            f"hyperformer.source.rows.{name}": torch.stack([weights[name] for weights in made])
            for name in adapters.sizes
        }


def at_each_place(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return one adapter's sizes for both blocks, by place and name."""
    return {f"{block}-{name}": size for block in PLACES for name, size in sizes.items()}


def _generator_linear(inputs: int, outputs: int, generator: Generator) -> nn.Linear:
    linear = new_linear(inputs, outputs, generator)
    with torch.no_grad():
        linear.weight.mul_(GENERATED_STD / STD)
    return linear


def _path(layout: Layout, block: str) -> str:
    return layout.attention_output if block == "attention" else layout.output


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
            "a network that makes the adapters of every task and layer; every layer norm",
            "Karimi Mahabadi et al. 2021",
            published=Published(3e-4, {"batch_size": 128}),
        ),
    }
)
