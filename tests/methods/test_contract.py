"""One contract for every method of the table."""

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.backbones import KINDS, Backbones, planned_backbone
from support.models import disturbed, experiment, logits_of, train_on_sixteen
from support.rows import SENTENCES, SIXTEEN, SIXTEEN_LABELS, write_rows

from unipelt_cli import methods
from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.pretrained import Pretrained, find
from unipelt_cli.errors import BackboneError, ConfigError
from unipelt_cli.files.sealed import open_tensors
from unipelt_cli.methods.base import CannotMerge
from unipelt_cli.models.build import build, refuse
from unipelt_cli.models.evaluation import compute_logits, encode_rows
from unipelt_cli.models.tuned import TunedModel, merge
from unipelt_cli.runs.names import MODEL, PROBE
from unipelt_cli.runs.run import read_run
from unipelt_cli.tasks import get_task
from unipelt_cli.training import execution
from unipelt_cli.training.events import Epoch, Finished
from unipelt_cli.training.loop import Training

NAMES = sorted(methods.table())


UNUSUAL = ("albert", "bart", "deberta-v2", "modernbert", "t5")
UNUSUAL_REFUSED = (
    *("adalora", "adamix", "adapter-fusion", "coda", "dora", "houlsby", "hyperformer", "ia3"),
    *("layernorm", "loreft", "lst", "mam", "moe-adapter", "parallel-adapter", "prompt"),
    *("propetl", "side-tuning", "top-layers", "vera"),
)
REFUSED = {
    (method, model_type): reason
    for refused, model_types, reason in (
        (UNUSUAL_REFUSED, UNUSUAL, "it is written for BERT's kind of layer, and a {}'s is another"),
        (("coda", "prompt"), ("mpnet",), "{} counts how far tokens are apart, and "),
        (
            ("compacter", "compacter-plus-plus", "madx"),
            (*UNUSUAL, "camembert", "mpnet"),
            "the adapters library does not carry it to a {}",
        ),
        (("bitfit",), ("modernbert", "t5"), "a {} has no biases"),
        (("unipelt-aplb",), ("modernbert", "t5"), "it has the part 'bias', and a {} has no biases"),
    )
    for method in refused
    for model_type in model_types
}
"""Why an architecture does not carry a method, at every cell where it does not."""
CARRIED = [(m, kind) for m in NAMES for kind in BACKBONES if (m, kind) not in REFUSED]
OTHERS = [
    (method, kind, attention)
    for kind, layout in KINDS.items()
    for attention in layout.attentions
    if kind not in BACKBONES or attention != "eager"
    for method in ("lora", "unipelt-aplb" if "bias" in layout.parts else "unipelt-apl")
]
"""What else a backbone may be. A union has every part, and an attention of ours for the prefix;
without a prefix the library's own runs."""


def check_alone_padded_and_in_company(tuned: TunedModel) -> None:
    """Check that a row's logits do not depend on padding, on other rows, or on its place."""
    alone = logits_of(disturbed(tuned), SENTENCES[1:2])
    assert alone.shape == (1, 3)
    assert (logits_of(tuned, SENTENCES[1:2], 128) - alone).abs().max() < 1e-5
    assert (logits_of(tuned, SENTENCES)[1] - alone[0]).abs().max() < 1e-5
    assert (logits_of(tuned, SENTENCES[::-1])[2] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize(("method", "model_type"), CARRIED)
def test_a_row_alone_padded_or_in_company_gives_the_same_logits(
    backbone_dir: Callable[[str], Path], method: str, model_type: str
) -> None:
    check_alone_padded_and_in_company(build(experiment(backbone_dir(model_type), method), 3))


@pytest.mark.parametrize(("method", "kind", "attention"), OTHERS)
def test_every_attention_of_every_kind_gives_a_row_the_same_logits_too(
    backbone_dir: Callable[[str], Path], method: str, kind: str, attention: str
) -> None:
    """By the library's layers, and with the mean of all tokens: a classifier's may read one."""
    read = {"attention": attention, "pooling": "mean"}
    settings = experiment(backbone_dir(kind), method, model=read)
    check_alone_padded_and_in_company(build(settings, 3, accelerate=False))


def test_an_architecture_refuses_exactly_the_methods_that_it_cannot_carry() -> None:
    reasons = {}
    for model_type in BACKBONES:
        backbone = planned_backbone(model_type)
        for method in NAMES:
            try:
                refuse(methods.get(method).method, method, backbone)
            except BackboneError as error:
                reasons[method, model_type] = error.message
    assert reasons.keys() == REFUSED.keys()
    for (method, model_type), reason in REFUSED.items():
        expected = f"method '{method}' on {model_type}: {reason.format(model_type)}"
        assert reasons[method, model_type].startswith(expected)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        *(("bert", name) for name in NAMES),
        *(("minilm", n) for n in ("unipelt-apl", "lora", "full")),
    ],
)
def test_in_bf16_it_does_within_the_rounding(
    backbone_dir: Callable[[str], Path], model: str, method: str
) -> None:
    directory = Path(model) if model == "minilm" else backbone_dir(model)
    tuned = disturbed(build(experiment(directory, method, train={"precision": "bf16"}), 3), 0.05)
    alone, company = logits_of(tuned, SENTENCES[1:2])[0], logits_of(tuned, SENTENCES)
    allowed = 0.02 * float(company.max() - company.min())
    assert (logits_of(tuned, SENTENCES[1:2], 128)[0] - alone).abs().max() < allowed
    assert (company[1] - alone).abs().max() < allowed
    assert (logits_of(tuned, SENTENCES[::-1])[2] - alone).abs().max() < allowed


def test_a_refused_backbone_is_refused_before_its_weights_are_read(
    backbone_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusals(*_: object) -> list[tuple[str, str]]:
        return [("it has no wings", "take one that flies")]

    monkeypatch.setattr(methods.Method, "refusals", refusals)
    monkeypatch.setattr(Pretrained, "load_backbone", lambda *_, **__: pytest.fail("weights read"))
    with pytest.raises(BackboneError, match=r"method 'head' on .*: it has no wings") as caught:
        build(experiment(backbone_dir("bert"), "head"), 2)
    assert caught.value.hint == "take one that flies"


@pytest.mark.parametrize("method", NAMES)
def test_training_moves_exactly_what_claims_to_train(
    backbone_dir: Callable[[str], Path], method: str
) -> None:
    tuned = build(experiment(backbone_dir("bert"), method, model={"pooling": "native"}), 2)
    disturbed(tuned)
    before = {name: tensor.clone() for name, tensor in tuned.classifier.state_dict().items()}
    # So many that a router which chooses by chance has chosen everyone.
    loop, _ = train_on_sixteen(tuned, epochs=6, warmup=0.0, weight_decay=0.1, learning_rate=1e-2)
    assert loop.steps == 3
    moved = {
        name
        for name, tensor in tuned.classifier.state_dict().items()
        if name not in tuned.buffers()
        and not (name in before and torch.equal(tensor, before[name]))
    }
    claimed = loop.carried.keys()
    assert moved <= claimed
    idle = "|".join([*tuned.method.idle, r".*embeddings\..*_embeddings\.weight"])
    still = {name for name in claimed - moved if not re.fullmatch(f"backbone.({idle})", name)}
    assert not still
    assert {"head.out.weight", "head.out.bias"} <= moved


@pytest.fixture(scope="session")
def finished(
    backbone_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Train every method for an epoch a stage; return the run directories."""
    root = tmp_path_factory.mktemp("runs")
    rows = write_rows(root / "rows.csv", 40)
    found = {}
    for name in NAMES:
        data = {
            "task": "own",
            "folds": 0,
            "train_file": str(rows),
            "text": "text",
            "label": "label",
        }
        settings = experiment(
            backbone_dir("bert"), name, data=data, train={"epochs": 1, "learning_rate": 1e-2}
        )
        *_, last = execution.execute(settings, root / name)
        assert isinstance(last, Finished)
        found[name] = root / name
    return found


@pytest.fixture(scope="session")
def reloaded(finished: dict[str, Path]) -> dict[str, str]:
    """Load every run in one fresh process; return its probe logits as hex."""
    code = (
        "import json, sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from unipelt_cli.runs.probe import probe\n"
        "from unipelt_cli.runs.run import read_run\n"
        "print(json.dumps({p: probe(read_run(Path(p)).build()).tobytes().hex()"
        " for p in sys.argv[1:]}))"
    )
    arguments = [sys.executable, "-c", code, *map(str, finished.values())]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(output)
    return {name: found[str(path)] for name, path in finished.items()}


@pytest.mark.parametrize("method", NAMES)
def test_a_fresh_process_gives_a_run_the_same_logits_to_the_bit(
    finished: dict[str, Path], reloaded: dict[str, str], method: str
) -> None:
    stored, _ = open_tensors(finished[method] / PROBE)
    assert stored["logits"].numpy().tobytes().hex() == reloaded[method]


@pytest.mark.parametrize("method", NAMES)
def test_what_is_stored_gives_the_trained_models_logits_to_the_bit(
    backbone_dir: Callable[[str], Path], method: str
) -> None:
    settings = experiment(backbone_dir("bert"), method)
    tuned = disturbed(build(settings, 2))
    loop, _ = train_on_sixteen(tuned, epochs=1, learning_rate=1e-2)
    stored = tuned.stored()
    fresh = build(settings, 2, folded=True)
    expected = fresh.stored()
    assert {n: (t.shape, t.dtype) for n, t in expected.items()} == {
        n: (t.shape, t.dtype) for n, t in stored.items()
    }
    fresh.load(stored)
    rows, _ = loop.dev
    assert (compute_logits(fresh, rows) == compute_logits(tuned, rows)).all()
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.stored().values(), stored.values(), strict=True)
    )


@pytest.mark.parametrize("method", NAMES)
def test_the_file_is_as_large_as_what_it_stores(finished: dict[str, Path], method: str) -> None:
    content = (finished[method] / MODEL).read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    tensors, _ = open_tensors(finished[method] / MODEL)
    assert len(content) - header == sum(t.numel() * t.element_size() for t in tensors.values())
    result = read_run(finished[method]).result
    numbers = sum(
        t.numel() if t.dtype == torch.float32 else -(-t.numel() // 4)
        for t in tensors.values()
        if t.dtype != torch.int32
    )
    assert result["stored_parameters"] + result["head_parameters"] == numbers
    assert result["artifact_bytes"] == len(content)


@pytest.mark.parametrize("method", NAMES)
def test_the_loss_falls_on_sixteen_rows(calm_bert: Path, method: str) -> None:
    tuned = build(experiment(calm_bert, method), 2)
    if tuned.method.has_closed_form:
        _, (loss,) = train_on_sixteen(tuned, epochs=8)
        assert loss < 0.1 * np.log(2), "far below what a head that knows nothing loses"
        return
    rate = 10 * methods.get(method).learning_rate
    _, losses = train_on_sixteen(tuned, epochs=8 * len(tuned.method.stages), learning_rate=rate)
    assert min(losses[-3:]) < losses[0]


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
    other = build(settings.with_("train", seed=43), 2).classifier.state_dict()
    assert not torch.equal(first["head.out.weight"], other["head.out.weight"])


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
    read = {"pooling": pooling, "normalise": False}
    settings = experiment(backbone_dir("bert"), method, model=read)
    with pytest.raises(CannotMerge, match=reason):
        merge(build(settings, 2))


@pytest.mark.parametrize("method", NAMES)
def test_bf16_stays_near_fp32_and_trains(backbone_dir: Callable[[str], Path], method: str) -> None:
    directory = backbone_dir("bert")
    exact = build(experiment(directory, method), 2)
    rough = build(experiment(directory, method, train={"precision": "bf16"}), 2)
    rows = encode_rows(exact, [SENTENCES], 128)
    difference = abs(compute_logits(exact, rows) - compute_logits(rough, rows)).max()
    assert 0 < difference < 0.1
    parameters = [p for p in rough.classifier.parameters() if p.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    _, losses = train_on_sixteen(rough, epochs=1)
    assert all(np.isfinite(losses))


@pytest.mark.parametrize("method", [n for n in NAMES if not methods.get(n).method.unmergeable])
def test_a_merged_backbone_is_plain_and_computes_the_same(
    backbone_dir: Callable[[str], Path], method: str
) -> None:
    read = {"pooling": "native", "normalise": False}
    tuned = build(experiment(backbone_dir("bert"), method, model=read), 2)
    plain = find(str(backbone_dir("bert"))).load_backbone("eager", pooler=True)[0].state_dict()
    train_on_sixteen(disturbed(tuned), epochs=1, learning_rate=1e-2)
    before = logits_of(tuned, SENTENCES)
    merge(tuned)
    assert tuned.classifier.backbone.state_dict().keys() == plain.keys()
    assert torch.allclose(logits_of(tuned, SENTENCES), before, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("unipelt-apl", {"lora_scale": 0.0}, "method.lora_scale = 0.0 is not allowed"),
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
    backbone_dir: Backbones, name: str, stop: int
) -> None:
    settings = experiment(backbone_dir("bert"), name, train={"epochs": 8, "learning_rate": 1e-2})
    rows = encode_rows(build(settings, 2), [SIXTEEN], 128)

    def loop(tuned: TunedModel) -> Training:
        data = rows, SIXTEEN_LABELS
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
