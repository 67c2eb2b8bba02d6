"""Adapters, rescaling, soft prompts and free unions, each against its paper's own formula."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    SENTENCES,
    bert_base_counts,
    by_the_hooks,
    disturbed,
    experiment,
    logits_of,
    save_backbone,
)
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli import methods
from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.layout import Layout
from unipelt_cli.config.experiment import resolve
from unipelt_cli.errors import BackboneError, ConfigError
from unipelt_cli.exports import adapters_folder
from unipelt_cli.methods.additive.sparse_adapter import SparseAdapter, _pack, _unpack
from unipelt_cli.methods.unipelt.gates import record_gates
from unipelt_cli.methods.unipelt.method import Submodules
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import Tuned, merge
from unipelt_cli.tasks import get_task
from unipelt_cli.training.events import Epoch
from unipelt_cli.training.loop import Training

Backbones = Callable[[str], Path]
PLAIN = sorted(name for name, layout in BACKBONES.items() if layout.is_plain)
ABSOLUTE = [name for name in PLAIN if name != "mpnet"]
IDS = torch.tensor([[2, 5, 9, 11, 30, 7, 3]])
LABELS = np.array([0, 1] * 8)
SIXTEEN = [f"the film was {('good', 'awful')[i % 2]} {'and red ' * (i % 4)}" for i in range(16)]

Change = Callable[[Tensor], Tensor]


def keep(x: Tensor) -> Tensor:
    return x


def layer_by_hand(
    layer: nn.Module,
    layout: Layout,
    h: Tensor,
    key: Change = keep,
    value: Change = keep,
    attention: Change = keep,
    inner: Change = keep,
    output: Callable[[Tensor, Tensor], Tensor] = lambda h1, z: z,
    apart: Tensor | float = 0.0,
) -> Tensor:
    """Compute a post-norm layer of 4 heads from its weights alone, for rows without padding."""

    def linear(path: str, x: Tensor) -> Tensor:
        module: Any = layer.get_submodule(path)
        return functional.linear(x, module.weight, module.bias)

    def norm(path: str, x: Tensor) -> Tensor:
        module: Any = layer.get_submodule(path)
        return functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), -1, 4, x.shape[-1] // 4).transpose(1, 2)

    q = heads(linear(layout.query, h))
    k, v = heads(key(linear(layout.key, h))), heads(value(linear(layout.value, h)))
    weights = (q @ k.mT / math.sqrt(q.shape[-1]) + apart).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(h.shape)
    h1 = norm(layout.attention_norm, h + attention(linear(layout.attention_output, mixed)))
    z = linear(layout.output, inner(functional.gelu(linear(layout.intermediate, h1))))
    return norm(layout.output_norm, h1 + output(h1, z))


def by_hand(tuned: Tuned, **changes: Callable[[int], Any]) -> Tensor:
    """Compute the last hidden state of IDS; each change is made for a layer by its index."""
    backbone, layout = tuned.classifier.backbone, tuned.pretrained.layout
    embeddings = backbone.get_submodule("embeddings")
    h: Tensor = changes.pop("embedded", lambda x: x)(embeddings(input_ids=IDS))
    biased: Any = getattr(backbone, "encoder", None)
    apart = getattr(biased, "compute_position_bias", lambda _: 0.0)(h)  # mpnet's
    for index, layer in enumerate(layout.layer_list(backbone)):
        made = {name: make(index) for name, make in changes.items()}
        h = layer_by_hand(layer, layout, h, apart=apart, **made)
    return h


def hidden_of(tuned: Tuned) -> Tensor:
    with torch.no_grad():
        output = tuned.classifier.backbone(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    hidden: Tensor = output.last_hidden_state
    return hidden


def part(tuned: Tuned, name: str) -> dict[str, Tensor]:
    """Return the tensors below a module of the backbone."""
    return dict(tuned.classifier.backbone.get_submodule(name).named_parameters())


def bottleneck(tensors: dict[str, Tensor], activation: Change) -> Change:
    def adapter(x: Tensor) -> Tensor:
        low = activation(x @ tensors["down.weight"].T + tensors["down.bias"])
        return low @ tensors["up.weight"].T + tensors["up.bias"]

    return adapter


def trained(tuned: Tuned, **train: object) -> Training:
    settings = resolve([("", {"data": {"task": "sst2"}, "train": {"batch_size": 6, **train}})])
    rows = encode_rows(tuned, [SIXTEEN], 128)
    return Training(tuned, get_task("sst2"), (rows, LABELS), (rows, LABELS), settings.train)


@pytest.mark.parametrize(
    ("name", "options", "trainable", "stored"),
    [
        ("houlsby", {}, 2_417_664, 2_417_664),
        ("houlsby", {"reduction": 16}, 1_789_056 + 38_400, 1_789_056 + 38_400),
        ("parallel-adapter", {}, 304_320, 304_320),
        ("parallel-adapter", {"parallel_bottleneck": 384}, 7_091_712, 7_091_712),
        # The table of 16 rows, its MLP of width 512, and the adapters.
        ("mam", {}, 16 * 768 + 769 * 512 + 513 * 18_432 + 304_320, 599_232),
        ("ia3", {}, 55_296, 55_296),
        ("prompt", {}, 7_680, 7_680),
        ("prompt", {"length": 100}, 76_800, 76_800),
        # Half of the matrices of bottleneck 96, the biases, and a bit an entry.
        ("sparse-adapter", {}, 884_736 + 10_368, 884_736 + 10_368 + 1_769_472 // 32),
        ("union", {"parts": "adapter,lora", "gated": False}, 894_528 + 294_912, 1_189_440),
        ("union", {"parts": "adapter,parallel"}, 894_528 + 304_320 + 18_456, 1_217_304),
    ],
)
def test_counts_on_bert_base_are_the_papers(
    name: str, options: dict[str, object], trainable: int, stored: int
) -> None:
    assert bert_base_counts(name, **options) == (trainable, stored)


@pytest.mark.parametrize("model_type", PLAIN)
def test_houlsby_adapts_what_each_block_adds_to_the_residual(
    backbone_dir: Backbones, model_type: str
) -> None:
    tuned = disturbed(build(experiment(backbone_dir(model_type), "houlsby"), 2))
    expected = by_hand(
        tuned,
        attention=lambda i: (
            lambda a: a + bottleneck(part(tuned, f"bottlenecks.{i}.attention"), functional.gelu)(a)
        ),
        output=lambda i: (
            lambda _, z: z + bottleneck(part(tuned, f"bottlenecks.{i}.output"), functional.gelu)(z)
        ),
    )
    assert torch.allclose(hidden_of(tuned), expected, atol=1e-5)
    assert not torch.allclose(expected, by_hand(tuned), atol=1e-2)


def test_houlsby_starts_near_the_backbone_and_trains_every_norm(backbone_dir: Backbones) -> None:
    tuned = build(experiment(backbone_dir("bert"), "houlsby"), 2)
    plain = build(experiment(backbone_dir("bert"), "head"), 2)
    assert 0 < (hidden_of(tuned) - hidden_of(plain)).abs().max() < 1e-4
    drawn = [m for m in part(tuned, "bottlenecks").values() if m.ndim == 2]
    assert all(matrix.abs().max() <= 2e-3 for matrix in drawn)
    norms = {name for name, m in tuned.classifier.named_modules() if isinstance(m, nn.LayerNorm)}
    own = {
        name.rpartition(".")[0]
        for name, parameter in tuned.classifier.named_parameters()
        if parameter.requires_grad and "bottlenecks" not in name and "head" not in name
    }
    assert own == norms


@pytest.mark.parametrize(("model_type", "place"), [("bert", "attention"), ("distilbert", "output")])
def test_houlsby_reads_after_the_dropout(
    backbone_dir: Backbones, model_type: str, place: str
) -> None:
    tuned = build(experiment(backbone_dir(model_type), "houlsby"), 2)
    adapter = tuned.classifier.backbone.get_submodule(f"bottlenecks.1.{place}")
    seen: list[Tensor] = []
    adapter.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tuned.classifier.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned.classifier(input_ids=IDS.expand(8, -1), attention_mask=torch.ones(8, IDS.shape[1]))
    assert 0.07 < (seen[0] == 0).float().mean() < 0.13


@pytest.mark.parametrize("model_type", PLAIN)
@pytest.mark.parametrize("gated", [False, True])
def test_the_parallel_adapter_reads_what_the_feed_forward_block_reads(
    backbone_dir: Backbones, model_type: str, gated: bool
) -> None:
    options = {"gated": gated, "parallel_scale": 3.0}
    settings = experiment(backbone_dir(model_type), "parallel-adapter", options=options)
    tuned = build(settings, 2)
    plain = build(experiment(backbone_dir(model_type), "head"), 2)
    assert torch.equal(hidden_of(tuned), hidden_of(plain))
    disturbed(tuned)

    def output(index: int) -> Callable[[Tensor, Tensor], Tensor]:
        own = part(tuned, f"submodules.layers.{index}")
        adapter = {n.removeprefix("parallel."): t for n, t in own.items() if "parallel." in n}

        def change(h1: Tensor, z: Tensor) -> Tensor:
            added = 3 * bottleneck(adapter, torch.relu)(h1)
            if gated:
                opened = h1 @ own["gates.parallel.weight"].T + own["gates.parallel.bias"]
                added = added * opened.sigmoid().mean(1, keepdim=True)
            return z + added

        return change

    expected = by_hand(tuned, output=output)
    assert torch.allclose(hidden_of(tuned), expected, atol=1e-5)
    assert not torch.allclose(expected, hidden_of(plain), atol=1e-2)


def test_a_free_union_has_the_gates_of_its_parts(backbone_dir: Backbones) -> None:
    options = {"parts": "lora,parallel,adapter,bias"}
    tuned = build(experiment(backbone_dir("bert"), "union", options=options), 2)
    with record_gates(tuned.classifier.backbone) as recorded:
        logits_of(tuned, SENTENCES)
    assert [set(layer) for layer in recorded] == [{"lora", "parallel", "adapter", "bias"}] * 2
    assert all(values.shape == (4,) for layer in recorded for values in layer.values())
    without = experiment(backbone_dir("bert"), "union", options=options | {"gated": False})
    with record_gates(build(without, 2).classifier.backbone) as recorded:
        assert not recorded


def test_every_part_may_have_a_rate_of_its_own(backbone_dir: Backbones) -> None:
    factors = {"adapter": 0.2, "prefix": 0.4, "lora": 3.0, "bias": 5.0, "parallel": 7.0}
    options = {f"{name}_rate": factor for name, factor in factors.items()}
    options["parts"] = ",".join(factors)
    tuned = build(experiment(backbone_dir("bert"), "union", options=options), 2)
    optimizer = trained(tuned, epochs=1).optimizer
    names = {id(p): name for name, p in tuned.classifier.named_parameters()}
    found: dict[str, set[float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)].removeprefix("backbone.submodules.")
            kind = next((k for k in ("head", "gates", *factors) if f".{k}." in f".{name}"), name)
            found.setdefault(kind, set()).add(group["factor"])
    assert found == {"head": {1.0}, "gates": {1.0}, **{k: {f} for k, f in factors.items()}}


def test_gates_start_where_their_bias_says(backbone_dir: Backbones) -> None:
    opened = []
    for bias in (-30.0, 0.0, 30.0):
        settings = experiment(backbone_dir("bert"), "union", options={"gate_bias": bias})
        tuned = build(settings, 2)
        with record_gates(tuned.classifier.backbone) as recorded:
            logits_of(tuned, SENTENCES)
        opened.append(torch.stack([torch.stack([*layer.values()]) for layer in recorded]))
    assert opened[0].max() < 1e-6
    assert 0.3 < opened[1].min() < opened[1].max() < 0.7
    assert opened[2].min() > 1 - 1e-6
    with pytest.raises(ConfigError, match=r"gate_bias = 1.0: there is no gate"):
        experiment(Path("minilm"), "union", options={"gated": False, "gate_bias": 1.0})


def test_mam_is_the_glue_recipe() -> None:
    recipe = methods.get("mam").method
    assert isinstance(recipe, Submodules)
    assert (recipe.prefix_length, recipe.parallel_bottleneck, recipe.parallel_scale) == (16, 16, 2)
    assert recipe.parts == ("prefix", "parallel")
    assert not recipe.gated


@pytest.mark.parametrize("model_type", PLAIN)
def test_ia3_scales_after_the_projection_and_after_the_non_linearity(
    backbone_dir: Backbones, model_type: str
) -> None:
    tuned = disturbed(build(experiment(backbone_dir(model_type), "ia3"), 2), 0.5)

    def scale(name: str) -> Callable[[int], Change]:
        return lambda index: lambda x: x * part(tuned, f"scales.layers.{index}")[name]

    expected = by_hand(tuned, key=scale("key"), value=scale("value"), inner=scale("inner"))
    assert torch.allclose(hidden_of(tuned), expected, atol=1e-5)
    assert not torch.allclose(expected, by_hand(tuned), atol=1e-2)


@pytest.mark.parametrize("model_type", PLAIN)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ia3_starts_as_the_backbone_to_the_bit(
    backbone_dir: Backbones, model_type: str, precision: str
) -> None:
    train = {"precision": precision}
    tuned = build(experiment(backbone_dir(model_type), "ia3", train=train), 2)
    plain = build(experiment(backbone_dir(model_type), "head", train=train), 2)
    assert torch.equal(hidden_of(tuned), hidden_of(plain))


@pytest.mark.parametrize("model_type", PLAIN)
def test_ia3_merges_into_the_weights(backbone_dir: Backbones, model_type: str) -> None:
    settings = experiment(backbone_dir(model_type), "ia3", model={"pooling": "native"})
    tuned = disturbed(build(settings, 2), 0.5)
    before = logits_of(tuned, SENTENCES)
    merge(tuned)
    assert not hasattr(tuned.classifier.backbone, "scales")
    assert torch.allclose(logits_of(tuned, SENTENCES), before, atol=1e-5)


@pytest.mark.parametrize("model_type", ABSOLUTE)
def test_soft_tokens_stand_after_the_first_and_leave_again(
    backbone_dir: Backbones, model_type: str
) -> None:
    tuned = disturbed(build(experiment(backbone_dir(model_type), "prompt"), 2), 0.5)
    plain = build(experiment(backbone_dir(model_type), "head"), 2)
    embedded = plain.classifier.backbone.get_submodule("embeddings")(input_ids=IDS)
    rows = part(tuned, "prompt")["rows"]
    assert rows.shape == (10, 32)
    inserted = torch.cat([embedded[:, :1], rows[None], embedded[:, 1:]], 1)
    full = by_hand(plain, embedded=lambda _: inserted)
    expected = torch.cat([full[:, :1], full[:, 11:]], 1)
    assert torch.allclose(hidden_of(tuned), expected, atol=1e-5)
    assert not torch.allclose(expected, hidden_of(plain), atol=1e-2)


def test_soft_tokens_are_refused_where_distances_count(backbone_dir: Backbones) -> None:
    with pytest.raises(BackboneError, match="mpnet counts how far tokens are apart"):
        build(experiment(backbone_dir("mpnet"), "prompt"), 2)


@pytest.mark.parametrize("model_type", ABSOLUTE)
def test_soft_tokens_take_no_positions_from_a_row_of_full_length(
    backbone_dir: Backbones, model_type: str
) -> None:
    tuned = build(experiment(backbone_dir(model_type), "prompt"), 2)
    config = tuned.classifier.backbone.config
    length = config.max_position_embeddings - tuned.pretrained.layout.position_offset
    ids = torch.full((1, length), 7)
    assert tuned.classifier(input_ids=ids, attention_mask=torch.ones_like(ids)).shape == (1, 2)


@pytest.mark.parametrize("start", ["vocabulary", "uniform"])
def test_soft_tokens_start_as_the_option_says(backbone_dir: Backbones, start: str) -> None:
    options = {"start": start}
    tuned = build(experiment(backbone_dir("bert"), "prompt", options=options), 2)
    rows = part(tuned, "prompt")["rows"]
    if start == "uniform":
        assert 0.4 < rows.abs().max() <= 0.5
        return
    embeddings: Any = tuned.classifier.backbone.get_submodule("embeddings")
    words = functional.layer_norm(embeddings.word_embeddings.weight, (32,), eps=1e-12)
    nearest = (rows[:, None] - words[None]).abs().amax(2).amin(1)
    assert nearest.max() < 1e-5


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone without dropout, whose gradients do not depend on luck."""
    directory = tmp_path_factory.mktemp("calm") / "bert"
    return save_backbone(
        directory, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def sparse(tuned: Tuned) -> Any:
    return tuned.classifier.backbone.get_submodule("sparsity")


@pytest.mark.parametrize("base", ["pfeiffer", "houlsby"])
def test_snip_keeps_the_entries_whose_removal_would_change_the_loss_most(
    calm: Path, base: str
) -> None:
    settings = experiment(calm, "sparse-adapter", options={"base": base, "kept": 0.3})
    tuned, twin = build(settings, 2), build(settings, 2)
    rows = encode_rows(twin, [SIXTEEN], 128)
    logits = twin.classifier(**rows.batch(range(16), twin.device))
    functional.cross_entropy(logits, torch.as_tensor(LABELS)).backward()
    own = dict(twin.classifier.backbone.named_parameters())
    scores = torch.cat([(own[n] * own[n].grad).abs().flatten() for n in sparse(twin).names])
    names = [n for n, p in own.items() if p.requires_grad and p.ndim == 2]
    assert sorted(sparse(twin).names) == sorted(names)
    count = round(0.3 * len(scores))
    trained(tuned, epochs=1)._prepare()
    mask = sparse(tuned).mask
    assert mask.sum() == count
    assert scores[mask].min() >= scores[~mask].max() * (1 - 1e-4)


def test_entries_that_are_not_kept_stay_zero_under_decay_and_momentum(calm: Path) -> None:
    tuned = build(experiment(calm, "sparse-adapter"), 2)
    loop = trained(tuned, epochs=3, learning_rate=1e-2, weight_decay=0.1)
    losses = [event.train_loss for event in loop.events() if isinstance(event, Epoch)]
    assert losses[-1] < losses[0]
    own = dict(tuned.classifier.backbone.named_parameters())
    flat = torch.cat([own[name].flatten() for name in sparse(tuned).names])
    assert not flat[~sparse(tuned).mask].any()
    stored = tuned.stored()
    assert stored["backbone.sparsity.bits"].dtype == torch.uint8
    assert stored["backbone.sparsity.bits"].numel() == -(-len(flat) // 8)
    assert stored["backbone.sparsity.kept"].numel() == round(len(flat) / 2)


@pytest.mark.parametrize("score", ["snip", "random"])
def test_a_sparse_run_goes_on_with_the_same_entries(calm: Path, score: str) -> None:
    settings = experiment(calm, "sparse-adapter", options={"score": score})
    train = {"epochs": 3, "learning_rate": 1e-2}
    whole = trained(build(settings, 2), **train)
    list(whole.events())
    begun = trained(build(settings, 2), **train)
    next(event for event in begun.events() if isinstance(event, Epoch))
    tensors, counters = begun.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = trained(build(settings, 2), **train)
    resumed.restore(saved, counters)
    list(resumed.events())
    ours, theirs = resumed.tuned.stored(), whole.tuned.stored()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("entries", [1, 7, 8, 9, 64, 100])
def test_packed_bits_come_back(entries: int) -> None:
    mask = torch.rand(entries, generator=torch.Generator().manual_seed(entries)) < 0.5
    assert torch.equal(_unpack(_pack(mask), entries), mask)
    assert len(_pack(mask)) == -(-entries // 8)


def test_everything_may_be_kept(calm: Path) -> None:
    tuned = build(experiment(calm, "sparse-adapter", options={"kept": 1.0, "reduction": 16}), 2)
    plain = by_the_hooks(build(experiment(calm, "adapter"), 2))
    trained(tuned, epochs=1)._prepare()
    assert isinstance(tuned.method, SparseAdapter)
    assert torch.equal(hidden_of(tuned), hidden_of(plain))


@pytest.mark.parametrize(
    ("method", "message", "remedy"),
    [
        ("mam", "has the part 'parallel', and adapters has no such", "method.parts=prefix)"),
        ("parallel-adapter", "has the part 'parallel'", "method.parts=adapter,prefix,lora"),
        ("houlsby", "method 'houlsby' adds what adapters has not", "--method unipelt-apl"),
        ("sparse-adapter", "method 'sparse-adapter' adds what", "--method unipelt-apl"),
        ("ia3", "method 'ia3' adds no submodules", "use --to hf"),
    ],
)
def test_adapters_is_not_given_what_it_cannot_hold(
    backbone_dir: Backbones, method: str, message: str, remedy: str
) -> None:
    settings = experiment(backbone_dir("bert"), method)
    run: Any = SimpleNamespace(directory="runs/x", experiment=settings)
    problem = adapters_folder.problem(run, build(settings, 2))
    assert problem is not None
    said, hint = problem
    assert message in said
    assert remedy in hint
