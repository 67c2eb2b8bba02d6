"""One contract for every method of the table, and the exact counts of the papers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel
from transformers.modeling_utils import no_init_weights

from unipelt_cli import methods
from unipelt_cli.backbones import BACKBONES, get_layout
from unipelt_cli.config import Experiment, resolve
from unipelt_cli.errors import ConfigError
from unipelt_cli.evaluation import compute_logits, encode_rows
from unipelt_cli.methods.base import CannotMerge
from unipelt_cli.methods.submodules import Submodules
from unipelt_cli.modeling import Tuned, build, merge

NAMES = sorted(methods.table())
SENTENCES = ["good film", "the plot was very bad but the cat sat on the red mat", "fine", "a b c"]


def experiment(backbone: Path, method: str, **sections: dict[str, object]) -> Experiment:
    settings = {
        "data": {"task": "sst2"},
        "model": {"backbone": str(backbone), "head_dropout": 0.0} | sections.get("model", {}),
        "method": {"name": method} | sections.get("options", {}),
        "train": {"device": "cpu", "precision": "fp32"} | sections.get("train", {}),
    }
    return resolve([("", settings)])


def disturbed(tuned: Tuned) -> Tuned:
    """Move every trained tensor, so that what a method adds is visible."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.classifier.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return tuned


def logits_of(tuned: Tuned, sentences: list[str], pad_to: int | None = None) -> torch.Tensor:
    rows = encode_rows(tuned, [sentences], 128)
    with torch.no_grad():
        batch = rows.batch(range(len(sentences)), tuned.device)
        if pad_to is not None:
            batch = {
                name: torch.nn.functional.pad(tensor, (0, pad_to - tensor.shape[1]))
                for name, tensor in batch.items()
            }
        return tuned.classifier.eval()(**batch)


@pytest.mark.parametrize("model_type", BACKBONES)
@pytest.mark.parametrize("method", NAMES)
def test_a_row_alone_padded_or_in_company_gives_the_same_logits(
    backbone_dir: Callable[[str], Path], model_type: str, method: str
) -> None:
    tuned = disturbed(build(experiment(backbone_dir(model_type), method), 3))
    alone = logits_of(tuned, SENTENCES[1:2])
    assert alone.shape == (1, 3)
    assert (logits_of(tuned, SENTENCES[1:2], 128) - alone).abs().max() < 1e-5
    assert (logits_of(tuned, SENTENCES)[1] - alone[0]).abs().max() < 1e-5
    assert (logits_of(tuned, SENTENCES[::-1])[2] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize("method", NAMES)
def test_one_step_moves_exactly_what_requires_grad(
    backbone_dir: Callable[[str], Path], method: str
) -> None:
    tuned = build(experiment(backbone_dir("bert"), method, model={"pooling": "native"}), 2)
    before = {name: tensor.clone() for name, tensor in tuned.classifier.state_dict().items()}
    trained = {n: p for n, p in tuned.classifier.named_parameters() if p.requires_grad}
    # LoRA's A moves only once its B has: two steps.
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    rows = encode_rows(tuned, [SENTENCES], 128).batch(range(4), tuned.device)
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(
            tuned.classifier(**rows), torch.tensor([0, 1, 0, 1])
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {
        name
        for name, tensor in tuned.classifier.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert moved <= trained.keys()
    still = trained.keys() - moved
    # A key bias adds the same to all of a query's scores; unused embeddings get no gradient.
    assert all(name.endswith("key.bias") or "embeddings" in name for name in still), still
    assert {"head.out.weight", "head.out.bias"} <= moved


@pytest.mark.parametrize("method", NAMES)
def test_stored_tensors_give_the_same_logits_in_a_fresh_model(
    backbone_dir: Callable[[str], Path], method: str
) -> None:
    settings = experiment(backbone_dir("bert"), method)
    tuned = disturbed(build(settings, 2))
    stored = tuned.stored()
    fresh = build(settings, 2, folded=True)
    names = {n for n, p in fresh.classifier.named_parameters() if p.requires_grad}
    assert names == stored.keys()
    fresh.load(stored)
    rows = encode_rows(tuned, [SENTENCES], 128)
    assert (compute_logits(fresh, rows) == compute_logits(tuned, rows)).all()


@pytest.mark.parametrize("method", NAMES)
def test_two_builds_from_one_seed_are_equal_and_leave_the_generator_alone(
    backbone_dir: Callable[[str], Path], method: str
) -> None:
    settings = experiment(backbone_dir("bert"), method)
    state = torch.random.get_rng_state()
    first = build(settings, 2).classifier.state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    second = build(settings, 2).classifier.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build(settings.replace("train", seed=43), 2).classifier.state_dict()
    assert not torch.equal(first["head.out.weight"], other["head.out.weight"])


@pytest.fixture(scope="module")
def bert_base() -> Callable[[str, dict[str, object]], tuple[int, int]]:
    """Count (trainable, stored) of a method on BERT-base with random weights."""
    with no_init_weights():
        backbone = BertModel(BertConfig())
    plain = dict(backbone.named_parameters())

    def count(name: str, options: dict[str, object]) -> tuple[int, int]:
        backbone.requires_grad_(False)
        method = methods.get(name).method
        import dataclasses

        method = dataclasses.replace(method, **options)
        method.attach(backbone, get_layout("bert"), torch.Generator().manual_seed(0))
        trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        stored = sum(tensor.numel() for tensor in method.fold(backbone).values())
        if isinstance(method, Submodules):
            for handle in backbone.submodules.handles:
                handle.remove()
            del backbone.submodules
        assert dict(backbone.named_parameters()).keys() == plain.keys()
        return trained, stored

    return count


LAYER_BIASES = 12 * 8_448
GATE_SET = 9_228


@pytest.mark.parametrize(
    ("name", "options", "trainable", "stored"),
    [
        ("adapter", {}, 894_528, 894_528),
        ("prefix", {}, 9_857_024, 184_320),
        ("lora", {}, 294_912, 294_912),
        ("unipelt-ap", {}, 10_770_008, 1_097_304),
        ("unipelt-apl", {}, 11_074_148, 1_401_444),
        ("unipelt-apl", {"lora_gates": "separate"}, 11_083_376, 1_410_672),
        (
            "unipelt-aplb",
            {},
            11_074_148 + LAYER_BIASES + GATE_SET,
            1_401_444 + LAYER_BIASES + GATE_SET,
        ),
        ("ap-ungated", {}, 10_770_008 - 2 * GATE_SET, 1_097_304 - 2 * GATE_SET),
        ("apl-ungated", {}, 11_074_148 - 3 * GATE_SET, 1_401_444 - 3 * GATE_SET),
        ("bitfit", {}, 102_912, 102_912),
        ("full", {}, 109_482_240, 109_482_240),
        ("head", {}, 0, 0),
    ],
)
def test_counts_on_bert_base_are_the_papers(
    bert_base: Callable[[str, dict[str, object]], tuple[int, int]],
    name: str,
    options: dict[str, object],
    trainable: int,
    stored: int,
) -> None:
    assert bert_base(name, options) == (trainable, stored)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
def test_bitfit_trains_every_bias_of_the_backbone_and_nothing_else(
    backbone_dir: Callable[[str], Path], model_type: str
) -> None:
    settings = experiment(backbone_dir(model_type), "bitfit", model={"pooling": "native"})
    backbone = build(settings, 2).classifier.backbone
    biases = {name for name, _ in backbone.named_parameters() if name.endswith("bias")}
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == biases


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize("parts", [("lora",), ("bias",), ("lora", "bias")])
def test_merged_equals_unmerged(
    backbone_dir: Callable[[str], Path], model_type: str, parts: tuple[str, ...]
) -> None:
    settings = experiment(
        backbone_dir(model_type), "lora", model={"pooling": "native"}, options={"parts": parts}
    )
    tuned = disturbed(build(settings, 2))
    before = logits_of(tuned, SENTENCES)
    merge(tuned)
    assert not hasattr(tuned.classifier.backbone, "submodules")
    assert torch.allclose(logits_of(tuned, SENTENCES), before, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "pooling", "reason"),
    [
        ("unipelt-apl", "native", "its gates depend on the input"),
        ("adapter", "native", "no plain weight computes what its adapter does"),
        ("ap-ungated", "native", "no plain weight computes what its adapter and prefix does"),
        ("lora", "mean", "the library's own classifier does not read mean pooling"),
    ],
)
def test_what_cannot_be_merged_says_why(
    backbone_dir: Callable[[str], Path], method: str, pooling: str, reason: str
) -> None:
    settings = experiment(backbone_dir("bert"), method, model={"pooling": pooling})
    with pytest.raises(CannotMerge, match=reason):
        merge(build(settings, 2))


@pytest.mark.parametrize("method", NAMES)
def test_bf16_stays_near_fp32(backbone_dir: Callable[[str], Path], method: str) -> None:
    directory = backbone_dir("bert")
    exact = build(experiment(directory, method), 2)
    rough = build(experiment(directory, method, train={"precision": "bf16"}), 2)
    rows = encode_rows(exact, [SENTENCES], 128)
    difference = abs(compute_logits(exact, rows) - compute_logits(rough, rows)).max()
    assert 0 < difference < 0.1
    trained = [p for p in rough.classifier.parameters() if p.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trained)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("unipelt-apl", {"lora_scale": 2.0}, "method.lora_scale = 2.0: has no effect"),
        ("unipelt-apl", {"parts": "lora,lora"}, "method.parts = .* a part is named twice"),
        ("unipelt-apl", {"parts": "lora,adaptr"}, "method.parts = 'lora,adaptr' is not allowed"),
        ("lora", {"gate_pooling": "all"}, "method.gate_pooling = 'all': there is no gate"),
        ("lora", {"rank": 0}, "method.rank = 0 is not allowed"),
        ("head", {"rank": 8}, "method.rank = 8: no such setting"),
    ],
)
def test_contradicting_hyperparameters_are_refused(
    method: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(Path("minilm"), method, options=options)
