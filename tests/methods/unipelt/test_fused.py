"""The fused layers compute what the library's layers and the hooks compute."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import disturbed, experiment, logits_of
from support.rows import SENTENCES
from torch import Tensor
from torch.nn import functional

from unipelt_cli import methods
from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.pretrained import find
from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.methods.unipelt.fused import layer as layer_module
from unipelt_cli.methods.unipelt.fused.stack import Stack
from unipelt_cli.methods.unipelt.inspection import closed, places, record_gates
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.build import build
from unipelt_cli.models.tuned import TunedModel, merge
from unipelt_cli.system.row_threads import lanes, run_parts, shared_out

FUSED = ("adapter", "ap-ungated", "apl-ungated", "lora", "prefix", "unipelt-ap", "unipelt-apl")
PLAIN = ("bert", "roberta", "electra", "distilbert")


def stack_of(tuned: TunedModel) -> Stack | None:
    container: Any = tuned.classifier.backbone.submodules
    stack: Stack | None = container.stack
    return stack


def test_dev_is_scored_with_what_the_last_step_made(backbone_dir: Callable[[str], Path]) -> None:
    settings = experiment(backbone_dir("bert"), "unipelt-apl", train={"precision": "bf16"})
    tuned = build(settings, 3)
    inputs = batch()
    trained = [p for p in tuned.classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, fused=True)
    for _ in range(3):
        gradients(tuned, inputs)
        optimizer.step()
        with torch.inference_mode():
            fast = tuned.classifier.eval()(**inputs)
            with by_hooks(tuned):
                slow = tuned.classifier(**inputs)
        assert far_apart(fast, slow) < 0.05


@contextmanager
def by_hooks(tuned: TunedModel) -> Iterator[None]:
    """Inside, the library's layers and the hooks compute."""
    stack, container = stack_of(tuned), tuned.classifier.backbone.submodules
    assert stack is not None
    stack.mask, container.stack = None, None  # type: ignore[union-attr, assignment]
    try:
        yield
    finally:
        container.stack = stack  # type: ignore[union-attr, assignment]


def batch(count: int = 7) -> dict[str, Tensor]:
    random = np.random.default_rng(0)
    ids = [random.integers(5, 30, random.integers(3, 24)).tolist() for _ in range(count)]
    return Encoded(ids, None, 0).batch(range(count), torch.device("cpu"))


def gradients(tuned: TunedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Take logits and gradients of one training pass, with dropout."""
    classifier = tuned.classifier.train()
    classifier.zero_grad()
    torch.manual_seed(11)
    logits = classifier(**inputs)
    functional.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
    named = classifier.named_parameters()
    return logits.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def with_options(settings: Experiment, options: dict[str, object]) -> Experiment:
    changed = settings.settings()
    changed["method"] |= options
    return resolve([("", changed)])


def sized(directory: Path, precision: str) -> Experiment:
    """Describe UniPELT at the paper's sizes: noise of 0.1 on wider parts drowns the backbone."""
    sizes = {"reduction": 16, "rank": 8, "lora_scale": 1.0}
    return experiment(directory, "unipelt-apl", options=sizes, train={"precision": precision})


def far_apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))


def check(tuned: TunedModel, bound: float) -> None:
    inputs = batch()
    assert stack_of(tuned) is not None
    with torch.inference_mode():
        fast = tuned.classifier.eval()(**inputs)
        with by_hooks(tuned):
            slow = tuned.classifier(**inputs)
    assert far_apart(fast, slow) < bound
    logits, grads = gradients(tuned, inputs)
    with by_hooks(tuned):
        expected_logits, expected = gradients(tuned, inputs)
    assert far_apart(logits, expected_logits) < bound
    assert not torch.equal(logits, fast), "dropout must have dropped something"
    assert grads.keys() == expected.keys()
    worst = {name: far_apart(grads[name], expected[name]) for name in grads}
    total = [torch.cat([g[name].flatten() for name in grads]) for g in (grads, expected)]
    assert far_apart(*total) < bound
    assert max(worst.values()) < 30 * bound, worst


@pytest.mark.parametrize("model_type", PLAIN)
@pytest.mark.parametrize("method", FUSED)
def test_it_computes_what_the_hooks_do(
    backbone_dir: Callable[[str], Path], model_type: str, method: str
) -> None:
    check(disturbed(build(experiment(backbone_dir(model_type), method), 3)), 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_gates": "separate"},
        {"lora_scale": 3.0},
        {"parts": ["prefix"]},
        {"parts": ["lora"]},
        {"parts": ["adapter"]},
    ],
)
def test_it_does_so_with_other_gates(
    backbone_dir: Callable[[str], Path], options: dict[str, object]
) -> None:
    settings = with_options(experiment(backbone_dir("bert"), "union"), options)
    check(disturbed(build(settings, 3)), 1e-5)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_it_does_so_where_no_matrix_can_be_packed(
    backbone_dir: Callable[[str], Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_module, "_packs", lambda kind: False)
    settings = sized(backbone_dir("bert"), kind)
    check(disturbed(build(settings, 3)), 1e-5 if kind == "fp32" else 0.05)


def test_the_backward_pass_runs_once(backbone_dir: Callable[[str], Path]) -> None:
    tuned = build(experiment(backbone_dir("bert"), "unipelt-apl"), 3)
    loss = tuned.classifier.train()(**batch()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_it_does_so_in_bf16(backbone_dir: Callable[[str], Path]) -> None:
    check(disturbed(build(sized(backbone_dir("bert"), "bf16"), 3)), 0.05)


def test_bf16_moves_the_gradients_of_gates_as_little_as_by_the_hooks(
    backbone_dir: Callable[[str], Path],
) -> None:
    directory, inputs = backbone_dir("bert"), batch(24)
    exact, rough = (disturbed(build(sized(directory, kind), 3)) for kind in ("fp32", "bf16"))
    (_, expected), (_, fused) = gradients(exact, inputs), gradients(rough, inputs)
    with by_hooks(rough):
        _, hooked = gradients(rough, inputs)

    def error(found: dict[str, Tensor]) -> float:
        gates = [name for name in expected if ".gates." in name and name.endswith("weight")]
        assert len(gates) == 3 * len(rough.classifier.backbone.submodules.layers)
        far = [far_apart(found[name], expected[name]) for name in gates]
        return sum(far) / len(far)

    assert 0 < error(fused) < min(0.05, 1.2 * error(hooked))


def test_it_does_so_in_the_stored_form(backbone_dir: Callable[[str], Path]) -> None:
    settings = experiment(backbone_dir("bert"), "unipelt-apl")
    check(disturbed(build(settings, 3, folded=True)), 1e-5)


def test_rows_shared_out_over_cores_give_the_same(backbone_dir: Callable[[str], Path]) -> None:
    tuned = disturbed(build(experiment(backbone_dir("bert"), "unipelt-apl"), 3))
    inputs = batch(40)
    logits, grads = gradients(tuned, inputs)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with shared_out(tuned.classifier.shares_rows):
            assert lanes() == 3
            shared, shared_grads = gradients(tuned, inputs)
        assert (torch.get_num_threads(), lanes()) == (3, 1)
    finally:
        torch.set_num_threads(threads)
    assert far_apart(shared, logits) < 1e-5
    assert all(far_apart(shared_grads[name], grads[name]) < 1e-4 for name in grads)


def test_a_part_that_fails_fails_the_whole_and_all_threads_come_back() -> None:
    def fail(part: int) -> int:
        if part == 5:
            raise ValueError(part)
        return part

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(ValueError, match="5"), shared_out(wanted=True):
            run_parts(fail, range(9))
        assert (torch.get_num_threads(), lanes()) == (3, 1)
        with shared_out(wanted=True):
            assert run_parts(fail, range(5)) == [0, 1, 2, 3, 4]
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_the_same_is_left_to_the_hooks(backbone_dir: Callable[[str], Path]) -> None:
    for model_type in BACKBONES:
        settings = experiment(backbone_dir(model_type), "lora")
        if list(settings.method.refusals(find(settings.model.backbone).layout, None)):
            continue
        is_fused = stack_of(build(settings, 3)) is not None
        assert is_fused == (model_type in (*PLAIN, "xlm-roberta", "camembert")), model_type
    for method, options in (("unipelt-aplb", {}), ("mam", {}), ("union", {"gate_pooling": "all"})):
        settings = with_options(experiment(backbone_dir("bert"), method), options)
        assert stack_of(build(settings, 3)) is None, method
    assert set(FUSED) < set(methods.table())


def test_weights_put_in_place_of_the_joined_ones_are_read(
    backbone_dir: Callable[[str], Path],
) -> None:
    tuned = disturbed(build(experiment(backbone_dir("bert"), "unipelt-apl"), 3))
    before = logits_of(tuned, SENTENCES)
    layer = tuned.classifier.backbone.encoder.layer[0].attention.self  # type: ignore[union-attr, index]
    layer.query.weight.data = 3 * layer.query.weight.data  # type: ignore[operator, union-attr]
    changed = logits_of(tuned, SENTENCES)
    assert (changed - before).abs().max() > 1e-3
    with by_hooks(tuned):
        assert torch.equal(logits_of(tuned, SENTENCES), changed)


def recorded_by(tuned: TunedModel, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Take the gates of one pass without gradients."""
    with torch.inference_mode(), record_gates(tuned.classifier.backbone) as recorded:
        tuned.classifier.eval()(**inputs)
    return recorded


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"lora_gates": "separate"}, {"parts": "prefix,adapter"}])
def test_it_records_the_gates_that_the_hooks_record(
    backbone_dir: Callable[[str], Path], options: dict[str, object], kind: str
) -> None:
    settings = experiment(backbone_dir("bert"), "union", options=options, train={"precision": kind})
    tuned, inputs = disturbed(build(settings, 3)), batch(40)
    stack = stack_of(tuned)
    assert stack is not None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with shared_out(tuned.classifier.shares_rows):  # in parts, whose rows are sorted
            found = recorded_by(tuned, inputs)
    finally:
        torch.set_num_threads(threads)
    with by_hooks(tuned):
        expected = recorded_by(tuned, inputs)
    assert [list(layer) for layer in found] == [list(layer) for layer in expected]
    for own, other in zip(found, expected, strict=True):
        for name, values in own.items():
            assert values.dtype == torch.float32
            assert values.std() > 1e-3
            assert (values - other[name]).abs().max() < (1e-5 if kind == "fp32" else 0.01), name
    ungated = build(experiment(backbone_dir("bert"), "apl-ungated"), 3)
    assert recorded_by(ungated, inputs) == [{}, {}]


def test_a_pass_with_gradients_is_recorded_by_the_hooks(
    backbone_dir: Callable[[str], Path],
) -> None:
    tuned = disturbed(build(experiment(backbone_dir("bert"), "unipelt-apl"), 3))
    with record_gates(tuned.classifier.backbone) as recorded:
        found = tuned.classifier.eval()(**batch())
    assert [list(layer) for layer in recorded] == [["prefix", "lora", "adapter"]] * 2
    assert far_apart(found.detach(), tuned.classifier(**batch()).detach()) < 1e-5
    assert not any(values.requires_grad for layer in recorded for values in layer.values())


@pytest.mark.parametrize("method", ["unipelt-apl", "apl-ungated"])
def test_what_is_closed_is_closed_as_by_the_hooks(
    backbone_dir: Callable[[str], Path], method: str
) -> None:
    tuned, inputs = disturbed(build(experiment(backbone_dir("bert"), method), 3)), batch()
    whole = tuned.classifier.eval()(**inputs).detach()
    everywhere = [(layer, part) for layer in range(2) for part in ("adapter", "prefix", "lora")]
    assert places(tuned.classifier.backbone) == everywhere
    with torch.inference_mode():
        for chosen in [[place] for place in everywhere] + [everywhere]:
            with closed(tuned.classifier.backbone, chosen):
                fast = tuned.classifier(**inputs)
                stack = stack_of(tuned)
                assert stack is not None
                assert stack.begin(inputs), "fused"
                with by_hooks(tuned):
                    slow = tuned.classifier(**inputs)
            assert far_apart(fast, slow) < 1e-5, chosen
            assert far_apart(fast, whole) > 1e-3, chosen
        assert far_apart(tuned.classifier(**inputs), whole) < 1e-5


def test_what_the_library_alone_can_give_comes_from_it(backbone_dir: Callable[[str], Path]) -> None:
    tuned = disturbed(build(experiment(backbone_dir("bert"), "unipelt-apl"), 3))
    backbone: Any = tuned.classifier.backbone
    inputs = batch()
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        fast = backbone(**inputs)
        slow = backbone(**inputs, output_hidden_states=True)
    assert far_apart(slow.last_hidden_state[real], fast.last_hidden_state[real]) < 1e-5
    assert all(far_apart(one, other) > 1e-3 for one, other in pairwise(slow.hidden_states))


def test_a_pass_that_fails_and_a_merge_leave_nothing_behind(
    backbone_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = experiment(backbone_dir("bert"), "lora", model={"pooling": "native"})
    tuned = disturbed(build(settings, 3))
    expected = logits_of(tuned, SENTENCES)
    with monkeypatch.context() as broken:
        broken.setattr(Stack, "run", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError), torch.inference_mode():
            tuned.classifier(**batch(3))
    merge(tuned)
    assert (logits_of(tuned, SENTENCES) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("folded", [True, False])
def test_what_is_kept_for_inference_follows_the_tensors(
    backbone_dir: Callable[[str], Path], folded: bool
) -> None:
    tuned = disturbed(build(experiment(backbone_dir("bert"), "unipelt-apl"), 3, folded=folded))
    stack = stack_of(tuned)
    assert stack is not None
    before = logits_of(tuned, SENTENCES)
    kept = stack.kept
    assert torch.equal(logits_of(tuned, SENTENCES), before)
    assert stack.kept is kept, "made ready once"
    assert (kept is not None) == folded, "what trains is made ready every time"
    for part in ("lora", "prefix", "adapter"):
        named = tuned.classifier.named_parameters()
        name, parameter = next((n, p) for n, p in named if part in n and p.requires_grad)
        before = logits_of(tuned, SENTENCES)
        with torch.no_grad():
            parameter.mul_(3)
        after = logits_of(tuned, SENTENCES)
        assert (after - before).abs().max() > 1e-4, name
        with by_hooks(tuned):
            assert (logits_of(tuned, SENTENCES) - after).abs().max() < 1e-5
