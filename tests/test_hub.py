"""Compacter, DoRA, VeRA, AdaLoRA, LoReFT, MAD-X and AdapterFusion are what their papers say."""

import shutil
from collections.abc import Callable
from pathlib import Path
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
    write_rows,
)
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.architectures import get_layout
from unipelt_cli.config.experiment import resolve
from unipelt_cli.errors import BackboneError, ConfigError
from unipelt_cli.files import sealed
from unipelt_cli.methods.additive import compacter
from unipelt_cli.methods.additive.adapter_fusion import AdapterFusion, FusedLayer
from unipelt_cli.methods.additive.madx import Corruption
from unipelt_cli.methods.base import Moment, Site
from unipelt_cli.methods.reparameterised.adalora import AdaLoRA, Contest, Triplets
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import Tuned
from unipelt_cli.runs import run as run_module
from unipelt_cli.runs.names import MODEL
from unipelt_cli.tasks import get_task
from unipelt_cli.training import execution
from unipelt_cli.training.events import Epoch, Finished
from unipelt_cli.training.loop import Training

SIXTEEN = [f"the film was {('good', 'awful')[i % 2]} {'and red ' * (i % 4)}" for i in range(16)]
LABELS = np.array([0, 1] * 8)
FUSION, PFEIFFER = 21_252_096, 894_528
Find = Callable[[str], Path]


def tuned_of(directory: Path, name: str, outputs: int = 2, **sections: Any) -> Tuned:
    return build(experiment(directory, name, **sections), outputs)


def trained(tuned: Tuned, **train: object) -> tuple[Training, list[float]]:
    """Train on sixteen sentences; return the loop and the epochs' losses."""
    settings = resolve([("", {"data": {"task": "sst2"}, "train": {"batch_size": 6, **train}})])
    rows = encode_rows(tuned, [SIXTEEN], 128)
    loop = Training(tuned, get_task("sst2"), (rows, LABELS), (rows, LABELS), settings.train)
    return loop, [event.train_loss for event in loop.events() if isinstance(event, Epoch)]


def seen(module: nn.Module, run: Callable[[], object]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what goes into a module and what comes out of it, its own hooks included."""
    found: list[tuple[tuple[Tensor, ...], Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, output: found.append((args, output)))
    run()
    handle.remove()
    return found[-1]


def moved(tuned: Tuned, **train: object) -> set[str]:
    before = {name: tensor.clone() for name, tensor in tuned.classifier.state_dict().items()}
    trained(tuned, **train)
    after = tuned.classifier.state_dict()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("name", "options", "trainable", "stored"),
    [
        ("compacter", {}, 57_088, 57_088),
        ("compacter-plus-plus", {}, 28_576, 28_576),
        ("dora", {}, 313_344, 313_344),
        ("vera", {}, 24_576, 24_576),
        ("vera", {"rank": 1024}, 43_008, 43_008),
        ("adalora", {}, 1_991_520, 1_991_520),
        ("loreft", {}, 18_444, 18_444),
        ("madx", {}, 2 * PFEIFFER + 296_064, 2 * PFEIFFER + 296_064),
        ("adapter-fusion", {}, FUSION + PFEIFFER, FUSION + PFEIFFER),
        ("adapter-fusion", {"adapters": "a,b"}, FUSION + PFEIFFER, FUSION + 3 * PFEIFFER),
    ],
)
def test_counts_on_bert_base_are_the_papers(
    name: str, options: dict[str, object], trainable: int, stored: int
) -> None:
    assert bert_base_counts(name, **options) == (trainable, stored)


@pytest.mark.parametrize("name", ["compacter", "madx"])
def test_an_architecture_that_the_library_lacks_is_refused(backbone_dir: Find, name: str) -> None:
    with pytest.raises(BackboneError, match="does not carry it to a camembert"):
        tuned_of(backbone_dir("camembert"), name)


def kronecker(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the dense (in, out) matrix of sum_i A_i kron (s_i t_i^T), number by number."""
    inputs, outputs = left.shape[1], right.shape[2]
    dense = torch.zeros(rule.shape[1] * inputs, rule.shape[2] * outputs)
    for a, s, t in zip(rule, left, right, strict=True):
        for row in range(len(dense)):
            for column in range(dense.shape[1]):
                factor = a[row // inputs, column // outputs]
                dense[row, column] += factor * (s[row % inputs] @ t[:, column % outputs])
    return dense


@pytest.mark.parametrize(
    ("name", "options", "place"),
    [
        ("compacter", {}, "attention.output"),
        ("compacter", {"rank": 2, "products": 2}, "output"),
        ("compacter-plus-plus", {}, "output"),
    ],
)
def test_compacter_adds_a_bottleneck_of_kronecker_sums_before_the_residual(
    backbone_dir: Find, name: str, options: dict[str, object], place: str
) -> None:
    tuned = disturbed(tuned_of(backbone_dir("bert"), name, options=options), 0.3)
    own = dict(tuned.classifier.backbone.named_parameters())
    rule = own["shared_parameters.compacter.phm_rule"]
    layer = tuned.classifier.backbone.encoder.layer[1]
    block = layer.get_submodule(place)
    (states, residual), output = seen(block, lambda: logits_of(tuned, SENTENCES))

    def dense(unit: str, x: Tensor) -> Tensor:
        prefix = f"encoder.layer.1.{place}.adapters.compacter.{unit}."
        matrix = kronecker(rule, own[f"{prefix}W_left"], own[f"{prefix}W_right"])
        return x @ matrix + own[f"{prefix}b"]

    with torch.no_grad():
        z = functional.linear(states, block.dense.weight, block.dense.bias)
        added = dense("adapter_up", functional.gelu(dense("adapter_down.0", z)))
        expected = block.LayerNorm(residual + z + added)
    assert added.abs().max() > 0.01
    assert torch.allclose(output, expected, atol=1e-5)


def test_compacter_has_one_set_of_rules_for_all_layers(backbone_dir: Find) -> None:
    tuned = disturbed(tuned_of(backbone_dir("bert"), "compacter"))
    backbone = tuned.classifier.backbone
    assert [n for n in tuned.stored() if n.endswith("phm_rule")] == [
        "backbone.shared_parameters.compacter.phm_rule"
    ]
    units = [m for n, m in backbone.named_modules() if n.endswith(("adapter_down.0", "adapter_up"))]
    assert len(units) == 8
    with torch.no_grad():
        backbone.shared_parameters["compacter"]["phm_rule"].zero_()
    for unit in units:  # with the rules at zero, every unit everywhere gives its bias alone
        _, output = seen(unit, lambda: logits_of(tuned, SENTENCES))
        assert torch.equal(output, unit.b.expand_as(output))


@pytest.mark.parametrize("hidden", [32, 128, 256, 312, 384, 768, 1024])
def test_compacters_bottleneck_is_a_multiple_that_the_library_takes_over(hidden: int) -> None:
    width = compacter.Compacter().width(hidden)
    assert width % 4 == 0
    assert width - 4 < hidden / 32 <= width or width == hidden // 32
    assert int(hidden // (hidden / (width + 0.5))) == width


def test_dora_starts_as_the_backbone_and_rescales_rows_but_not_the_bias(
    backbone_dir: Find,
) -> None:
    directory = backbone_dir("bert")
    tuned = tuned_of(directory, "dora", options={"rank": 3})
    plain = tuned_of(directory, "head")
    read = "encoder.layer.0.attention.self.query"
    for model in (tuned, plain):
        model.classifier.eval()
    outputs = [
        seen(model.classifier.backbone.encoder, lambda m=model: logits_of(m, SENTENCES))[1][0]
        for model in (tuned, plain)
    ]
    assert torch.equal(*outputs)

    disturbed(tuned)
    linear = tuned.classifier.backbone.get_submodule(read)
    own = tuned.classifier.backbone.updates.layers[0]["query"]
    direction = linear.weight + 2.0 * own.b @ own.a
    weight = torch.stack([own.magnitude[o] * v / v.norm() for o, v in enumerate(direction)])
    (x,), output = seen(linear, lambda: logits_of(tuned, SENTENCES))
    assert torch.allclose(output, x @ weight.T + linear.bias, atol=1e-5)
    merged = own.merged(linear.weight)
    assert torch.allclose(merged, weight, atol=1e-6)
    assert torch.allclose(merged.norm(dim=1), own.magnitude.abs(), atol=1e-6)


def test_doras_norm_is_a_constant_in_the_backward_pass(backbone_dir: Find) -> None:
    tuned = disturbed(tuned_of(backbone_dir("bert"), "dora", options={"rank": 3}))
    linear = tuned.classifier.backbone.encoder.layer[0].attention.self.query
    own = tuned.classifier.backbone.updates.layers[0]["query"]
    x, way = torch.randn(5, 32), torch.randn(5, 32)

    def gradient(*, constant: bool) -> Tensor:
        direction = linear.weight + 2.0 * own.b @ own.a
        norm = direction.norm(dim=1)
        norm = norm.detach() if constant else norm
        output = x @ ((own.magnitude / norm)[:, None] * direction).T + linear.bias
        return torch.autograd.grad((output * way).sum(), own.a)[0]

    found = torch.autograd.grad((linear(x) * way).sum(), own.a)[0]
    assert torch.allclose(found, gradient(constant=True), atol=1e-5)
    assert not torch.allclose(found, gradient(constant=False), atol=1e-3)


def test_vera_scales_matrices_that_all_layers_share_and_no_run_stores(backbone_dir: Find) -> None:
    settings = experiment(backbone_dir("bert"), "vera", options={"rank": 6})
    tuned = disturbed(build(settings, 2))
    updates = tuned.classifier.backbone.updates
    folded = build(settings, 2, folded=True).classifier.backbone.updates
    other = build(settings.replace("train", seed=43), 2).classifier.backbone.updates
    for name in ("a", "b"):
        matrix = getattr(updates.shared, name)
        assert torch.equal(matrix, getattr(folded.shared, name))
        assert not torch.equal(matrix, getattr(other.shared, name))
    assert {n for n in tuned.stored() if n.startswith("backbone")} == {
        f"backbone.updates.layers.{layer}.{place}.{name}"
        for layer in (0, 1)
        for place in ("query", "value")
        for name in ("d", "b")
    }
    a, b = updates.shared.a, updates.shared.b
    for index, layer in enumerate(tuned.classifier.backbone.encoder.layer):
        linear = layer.attention.self.value
        own = updates.layers[index]["value"]
        weight = torch.diag(own.b) @ b @ torch.diag(own.d) @ a
        (x,), output = seen(linear, lambda: logits_of(tuned, SENTENCES))
        assert (x @ weight.T).abs().max() > 0.01
        expected = functional.linear(x, linear.weight + weight, linear.bias)
        assert torch.allclose(output, expected, atol=1e-5)


def test_vera_starts_as_the_backbone_with_the_papers_numbers(backbone_dir: Find) -> None:
    updates = tuned_of(backbone_dir("bert"), "vera").classifier.backbone.updates
    for update in updates:
        assert torch.equal(update.d, torch.full((256,), 0.1))
        assert not update.b.any()


def test_adaloras_penalty_and_importance_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(3)
    triplets = Triplets(nn.Linear(5, 4), 3, 1.0, generator)
    contest = Contest(triplets)
    expected = 0.0
    p, q = triplets.p.detach(), triplets.q.detach()
    for i in range(3):
        for j in range(3):
            expected += (float(p[:, i] @ p[:, j]) - float(i == j)) ** 2
            expected += (float(q[i] @ q[j]) - float(i == j)) ** 2
    assert triplets.penalty().item() == pytest.approx(expected, rel=1e-5)

    smoothed = {name: torch.zeros_like(p) for name, p in triplets.named_parameters()}
    uncertain = {name: torch.zeros_like(p) for name, p in triplets.named_parameters()}
    for _ in range(3):
        for name, parameter in triplets.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            now = (parameter.detach() * parameter.grad).abs()
            smoothed[name] = 0.85 * smoothed[name] + 0.15 * now
            far = (now - smoothed[name]).abs()
            uncertain[name] = 0.85 * uncertain[name] + 0.15 * far
        contest.observe(triplets, 0.85)
        assert not contest.smoothed.requires_grad
        with torch.no_grad():
            triplets.values.add_(0.5)
    score = {name: smoothed[name] * uncertain[name] for name in smoothed}
    by_hand = [
        float(score["values"][i] + score["p"][:, i].mean() + score["q"][i].mean()) for i in range(3)
    ]
    assert contest.importance(triplets).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_adaloras_budget_falls_to_its_target_before_an_epoch_can_be_chosen(
    backbone_dir: Find,
) -> None:
    method = AdaLoRA()
    budgets = [method.budget(Moment(0, step, 40)) for step in range(40)]
    assert budgets[:8] == [12.0] * 8
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[23] == pytest.approx(8 + 4 * (1 - 16 / 32) ** 3)
    assert budgets[-1] == 8.0

    tuned = tuned_of(backbone_dir("bert"), "adalora")
    loop, _ = trained(tuned, epochs=8, learning_rate=1e-2, patience=2)
    assert loop.lengths == [2, 6]
    assert loop.progress.best_epoch > 2
    values = [t for n, t in tuned.stored().items() if n.endswith(".values")]
    kept = [int(v.count_nonzero()) for v in values]
    assert sum(kept) == 8 * len(values) == 96
    assert len(set(kept)) > 1  # matrices compete: not each has eight


def test_adalora_keeps_the_most_important_triplets_of_the_whole_backbone(
    backbone_dir: Find,
) -> None:
    tuned = tuned_of(backbone_dir("bert"), "adalora", options={"rank": 2, "target_rank": 1})
    updates, method = tuned.classifier.backbone.updates, tuned.method
    for index, contest in enumerate(updates.contests):
        for buffer in (contest.smoothed, contest.uncertainty):
            buffer.fill_(float(index))
    disturbed(tuned)
    method.after_step(tuned.classifier.backbone, Moment(0, 9, 10))
    kept = [contest.kept.tolist() for contest in updates.contests]
    assert kept == [[0.0, 0.0]] * 6 + [[1.0, 1.0]] * 6
    assert [bool(update.values.any()) for update in updates] == [False] * 6 + [True] * 6
    with pytest.raises(ConfigError, match=r"method\.target_rank = 9: more than rank = 8"):
        experiment(Path("minilm"), "adalora", options={"rank": 8, "target_rank": 9})


@pytest.mark.parametrize("first", [None, 2])
def test_loreft_edits_states_within_its_subspace_and_never_padding(
    backbone_dir: Find, first: int | None
) -> None:
    options = {"rank": 3, **({} if first is None else {"first_tokens": first})}
    tuned = disturbed(tuned_of(backbone_dir("bert"), "loreft", options=options))
    trained(tuned, epochs=1, learning_rate=1e-2)
    rows = tuned.stored()["backbone.edits.layers.1.rows"]
    assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-6)
    norm = tuned.classifier.backbone.encoder.layer[1].output.LayerNorm
    target = tuned.classifier.backbone.edits.layers[1].target
    (summed,), output = seen(norm, lambda: logits_of(tuned, SENTENCES[2:], pad_to=9))
    before = functional.layer_norm(summed, (32,), norm.weight, norm.bias, norm.eps)
    rows_of = encode_rows(tuned, [SENTENCES[2:]], 128)
    edited = 0
    for row, length in enumerate(rows_of.lengths):
        for place in range(9):
            h = before[row, place]
            if place < min(length, first or 99):
                edited += 1
                wanted = target.weight @ h + target.bias - rows @ h
                assert torch.allclose(output[row, place], h + rows.T @ wanted, atol=1e-5)
                assert not torch.allclose(output[row, place], h, atol=1e-3)
            else:
                assert torch.equal(output[row, place], h)
    assert edited == (sum(rows_of.lengths) if first is None else 4)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
def test_madxs_inverse_undoes_its_invertible_adapter(backbone_dir: Find, model_type: str) -> None:
    tuned = disturbed(tuned_of(backbone_dir(model_type), "madx"), 0.3)
    adapter = tuned.classifier.backbone.invertible_adapters["language"]
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        there = adapter(x)
        left, right = x[..., :16], x[..., 16:]
        first = left + adapter.F(right)
        assert torch.allclose(there, torch.cat([first, right + adapter.G(first)], -1), atol=1e-6)
        assert (there - x).abs().max() > 0.1
        assert torch.allclose(adapter(there, rev=True), x, atol=1e-5)
    embeddings = tuned.classifier.backbone.embeddings
    hooks = seen(embeddings, lambda: logits_of(tuned, SENTENCES))[1]
    plain = seen(embeddings.LayerNorm, lambda: logits_of(tuned, SENTENCES))[1]
    assert torch.allclose(hooks, adapter(plain), atol=1e-5)


def test_madx_learns_the_language_first_and_then_leaves_it_alone(backbone_dir: Find) -> None:
    options = {"language_share": 3.0, "language_rate": 1.0}
    tuned = disturbed(tuned_of(backbone_dir("bert"), "madx", options=options))
    classifier = tuned.classifier
    start = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    at_change: dict[str, Tensor] = {}
    enter = type(tuned.method).enter

    def watched(method: Any, backbone: nn.Module, stage: int) -> None:
        at_change.update({n: t.clone() for n, t in classifier.state_dict().items()})
        enter(method, backbone, stage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tuned.method), "enter", watched)
        _, losses = trained(tuned, epochs=2, learning_rate=1e-2)
    assert min(losses[3:6]) < losses[0] - 0.1  # it learns to restore tokens
    first = {n for n in start if not torch.equal(start[n], at_change[n])}
    second = {n for n in start if not torch.equal(at_change[n], classifier.state_dict()[n])}
    parts = {
        part: {f"backbone.{n}" for n in compacter.tensors(classifier.backbone, part)}
        for part in ("language", "task")
    }
    assert first == parts["language"]
    assert second == parts["task"] | {"head.out.weight", "head.out.bias"}


def test_madxs_stack_with_an_idle_language_part_is_a_pfeiffer_adapter(backbone_dir: Find) -> None:
    directory = backbone_dir("bert")
    settings = experiment(directory, "madx")
    stacked, single = build(settings, 2, folded=True), tuned_of(directory, "adapter")
    disturbed(single)
    own = dict(stacked.classifier.named_parameters())
    with torch.no_grad():
        for name, parameter in single.classifier.named_parameters():
            if not parameter.requires_grad:
                continue
            there = name.replace("submodules.layers", "encoder.layer").replace(
                "adapter.", "output.adapters.task.adapter_"
            )
            own[there.replace("adapter_down", "adapter_down.0")].copy_(parameter)
        for name, parameter in own.items():
            if any(f"language.{last}" in name for last in ("adapter_up", "F.2", "G.2")):
                parameter.zero_()
        expected = logits_of(single, SENTENCES)
        assert torch.allclose(logits_of(stacked, SENTENCES), expected, atol=1e-5)
        for name, parameter in own.items():
            if "adapters.language.adapter_up" in name:
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
        assert not torch.allclose(logits_of(stacked, SENTENCES), expected, atol=1e-2)


def test_madxs_language_part_has_a_rate_of_its_own(backbone_dir: Find) -> None:
    tuned = tuned_of(backbone_dir("bert"), "madx", options={"language_rate": 0.3})
    rates = {name: tuned.method.rate(name) for name in tuned.method.fold(tuned.classifier.backbone)}
    language = compacter.tensors(tuned.classifier.backbone, "language").keys()
    assert rates == {name: 0.3 if name in language else 1.0 for name in rates}


@pytest.mark.parametrize("mask_id", [4, None])
def test_madx_corrupts_text_alone_and_each_row_at_least_once(mask_id: int | None) -> None:
    layout, generator = get_layout("bert"), torch.Generator()
    site = Site(layout, generator, mask_id=mask_id, special_ids=frozenset({0, 2, 3}))
    corruption = Corruption(site, vocabulary=50, share=0.15)
    ids = torch.tensor([[2, *range(5, 45), 3, 5, 0], [2, 7, 3, *[0] * 41]]).repeat(200, 1)
    mask = (ids != 0).long()
    mask[0, -1] = 0
    torch.manual_seed(0)
    corrupted, chosen = corruption(ids, mask)
    text = mask.bool() & ~torch.isin(ids, torch.tensor([0, 2, 3]))
    assert not (chosen & ~text).any()
    assert chosen.any(1).all()
    assert torch.equal(corrupted[~chosen], ids[~chosen])
    long = chosen[::2].float().sum() / text[::2].sum()
    assert 0.13 < long < 0.18
    changed = (corrupted != ids)[chosen].float().mean()
    assert 0.85 < changed < 0.93
    if mask_id is None:
        assert len(corrupted[chosen].unique()) > 40
    else:
        assert 0.75 < (corrupted[chosen] == 4).float().mean() < 0.85


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("adalora", 1),
        ("adalora", 2),
        ("adalora", 4),
        ("madx", 1),
        ("madx", 5),
        ("madx", 7),
        ("adapter-fusion", 1),
        ("adapter-fusion", 9),
    ],
)
def test_a_loop_that_was_stopped_in_a_stage_goes_on_to_the_bit(
    backbone_dir: Find, name: str, stop: int
) -> None:
    settings = experiment(backbone_dir("bert"), name, train={"epochs": 8, "learning_rate": 1e-2})
    rows = encode_rows(build(settings, 2), [SIXTEEN], 128)

    def loop(tuned: Tuned) -> Training:
        data = rows, LABELS
        return Training(tuned, get_task("sst2"), data, data, settings.train)

    whole, halted, resumed = (build(settings, 2) for _ in range(3))
    list(loop(whole).events())
    first = loop(halted)
    for event in first.events():
        if isinstance(event, Epoch) and event.epoch == stop:
            break
    else:
        pytest.fail("it never came so far")
    second = loop(resumed)
    second.restore(*first.state())
    list(second.events())
    expected = whole.stored()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in resumed.stored().items())


@pytest.fixture(scope="module")
def adapter_runs(backbone_dir: Find, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Train the method `adapter` twice, and `lora` once; return the run directories."""
    root = tmp_path_factory.mktemp("sources")
    rows = write_rows(root / "rows.csv", 40)
    data = {"task": "own", "train_file": str(rows), "text": "text", "label": "label"}
    found = []
    for seed, name in ((1, "adapter"), (2, "adapter"), (3, "lora")):
        train = {"epochs": 1, "learning_rate": 1e-2, "seed": seed}
        settings = experiment(backbone_dir("bert"), name, data=data, train=train)
        *_, last = execution.execute(settings, root / str(seed))
        assert isinstance(last, Finished)
        found.append(root / str(seed))
    return found


def fused_of(directory: Path, runs_: list[Path], **options: object) -> Tuned:
    adapters = ",".join(map(str, runs_))
    return tuned_of(directory, "adapter-fusion", options={"adapters": adapters, **options})


def test_fusion_of_one_adapter_is_that_adapter(backbone_dir: Find) -> None:
    directory = backbone_dir("bert")
    single, fused = tuned_of(directory, "adapter"), tuned_of(directory, "adapter-fusion")
    by_the_hooks(disturbed(single))
    backbone, others = fused.classifier.backbone, single.classifier.backbone.submodules.layers
    with torch.no_grad():
        fused.classifier.head.load_state_dict(single.classifier.head.state_dict())
        for own, other in zip(backbone.fusion, others, strict=True):
            own.own.load_state_dict(other.adapter.state_dict())
    expected = logits_of(single, SENTENCES)
    assert torch.equal(logits_of(fused, SENTENCES), expected)  # the first stage: no fusion yet
    fused.method.enter(backbone, 1)
    assert torch.allclose(logits_of(fused, SENTENCES), expected, atol=1e-4)
    identity = torch.full((32, 32), 1e-6).fill_diagonal_(1.0)
    assert all(torch.equal(layer.value, identity) for layer in backbone.fusion)
    for model in (fused, single):
        assert torch.equal(logits_of(model, SENTENCES), logits_of(model, SENTENCES))


def test_fusion_mixes_adapters_by_attention_of_each_token() -> None:
    generator = torch.Generator().manual_seed(5)
    layer = FusedLayer(8, 2, 2, generator)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    layer.fuses = True
    x = torch.randn(2, 3, 8, generator=generator)
    adapters = [*layer.loaded, layer.own]
    with torch.no_grad():
        found = layer(x)
        for row in range(2):
            for token in range(3):
                h = x[row, token]
                z = [
                    a.up.weight @ (a.down.weight @ h + a.down.bias).relu() + a.up.bias
                    for a in adapters
                ]
                q = layer.query.weight @ h + layer.query.bias
                scores = [float(q @ (layer.key.weight @ one + layer.key.bias)) for one in z]
                weights = np.exp(scores) / np.exp(scores).sum()
                values = [w * (layer.value @ one) for w, one in zip(weights, z, strict=True)]
                assert torch.allclose(found[row, token], sum(values).float(), atol=1e-5)
    assert max(weights) < 0.99


def test_fusion_takes_up_finished_runs_and_outlives_them(
    backbone_dir: Find, adapter_runs: list[Path], tmp_path: Path
) -> None:
    copies = [Path(shutil.copytree(run, tmp_path / run.name)) for run in adapter_runs[:2]]
    tuned = fused_of(backbone_dir("bert"), copies)
    for index, run in enumerate(copies):
        stored, _ = sealed.open_tensors(run / MODEL)
        for layer in (0, 1):
            loaded = tuned.stored()[f"backbone.fusion.{layer}.loaded.{index}.down.weight"]
            source = stored[f"backbone.submodules.layers.{layer}.adapter.down.weight"]
            assert torch.equal(loaded, source)
    assert not torch.equal(
        *(tuned.stored()[f"backbone.fusion.0.loaded.{i}.down.weight"] for i in (0, 1))
    )
    names = moved(tuned, epochs=2, learning_rate=1e-2, warmup=0.0)
    assert not any(".loaded." in name for name in names)
    assert {"backbone.fusion.0.own.up.weight", "backbone.fusion.1.query.weight"} <= names

    data = {"task": "own", "train_file": str(tmp_path / "rows.csv"), "text": "text"}
    write_rows(tmp_path / "rows.csv", 40)
    settings = experiment(
        backbone_dir("bert"),
        "adapter-fusion",
        data={**data, "label": "label"},
        train={"epochs": 1, "learning_rate": 1e-2},
        options={"adapters": ",".join(map(str, copies))},
    )
    *_, last = execution.execute(settings, tmp_path / "fused")
    assert isinstance(last, Finished)
    for run in copies:
        shutil.rmtree(run)
    run_module.read_run(tmp_path / "fused").build()  # compares the probe's logits


def test_fusion_refuses_what_is_no_finished_adapter_of_this_backbone(
    backbone_dir: Find, adapter_runs: list[Path], tmp_path: Path
) -> None:
    bert, (adapter, _, lora) = backbone_dir("bert"), adapter_runs
    unfinished = Path(shutil.copytree(adapter, tmp_path / "unfinished"))
    (unfinished / "result.json").unlink()
    torn = Path(shutil.copytree(adapter, tmp_path / "torn"))
    content = (torn / MODEL).read_bytes()
    (torn / MODEL).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    cut = Path(shutil.copytree(adapter, tmp_path / "cut"))
    (cut / MODEL).write_bytes(content[:100])
    other = save_backbone(tmp_path / "other", "roberta")
    for directory, run, options, message in (
        (bert, tmp_path / "nowhere", {}, "no finished run"),
        (bert, unfinished, {}, "no finished run"),
        (bert, torn, {}, r"its model.safetensors is damaged"),
        (bert, cut, {}, r"its model.safetensors is damaged"),
        (bert, lora, {}, "holds something other than one adapter a layer"),
        (bert, adapter, {"reduction": 8}, "its bottlenecks have 2 units, this run's 4"),
        (other, adapter, {}, "was trained on another backbone"),
    ):
        with pytest.raises(ConfigError, match=f"method.adapters = .*{run.name}': {message}"):
            fused_of(directory, [run], **options)
    with pytest.raises(ConfigError, match="a run is named twice"):
        fused_of(bert, [adapter, adapter])


def test_fusion_pulls_its_values_to_the_identity(backbone_dir: Find) -> None:
    tuned = tuned_of(backbone_dir("bert"), "adapter-fusion")
    method, backbone = tuned.method, tuned.classifier.backbone
    assert isinstance(method, AdapterFusion)
    with torch.no_grad():
        backbone.fusion[0].value[2, 3] += 3.0
        backbone.fusion[1].value[1, 1] += 4.0
    one = torch.ones(())

    class Step:
        def __init__(self, stage: int) -> None:
            self.backbone, self.moment = backbone, Moment(stage, 0, 1)

        def forward(self) -> Tensor:
            return one

        def criterion(self, logits: Tensor) -> Tensor:
            return logits

    assert float(method.loss(Step(0))) == 1.0  # type: ignore[arg-type]
    assert float(method.loss(Step(1))) == pytest.approx(1 + 0.01 * 25, abs=1e-5)  # type: ignore[arg-type]
    assert not method.decays("fusion.0.value")
