"""Pairs read apart: what the head reads of them, on which backbones, and with which tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.backbones import Backbones
from support.models import disturbed, experiment
from support.pairs import FIRST, SECOND, sentence_encoder
from support.rows import SENTENCES

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.models.batches import by_length
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import compute_logits, compute_with_gates, encode_rows
from unipelt_cli.models.tuned import TunedModel

CPU = torch.device("cpu")
APART = {"pairs": "apart", "pooling": "mean"}


def built(
    directory: Path, method: str = "unipelt-apl", outputs: int = 2, **model: Any
) -> TunedModel:
    settings = experiment(directory, method, model={**APART, **model})
    return disturbed(build(settings, outputs, pairs=[True]))


def test_a_head_reads_differences_products_and_the_cosine_of_unit_vectors(bert: Path) -> None:
    tuned = built(bert)
    rows = encode_rows(tuned, [FIRST, SECOND], 128)
    with torch.no_grad():
        features = tuned.classifier.features(**rows.batch(range(4), CPU)).numpy()
    for row, texts in enumerate(zip(FIRST, SECOND, strict=True)):
        vectors = []
        for text in texts:
            inputs = tuned.tokenizer([text], return_tensors="pt")
            with torch.no_grad():
                hidden = tuned.classifier.backbone(**inputs).last_hidden_state[0].numpy()
            mean = hidden.mean(0)
            vectors.append(mean / np.linalg.norm(mean))
        u, v = vectors
        expected = [*np.abs(u - v), *(u * v), u @ v]
        assert features[row] == pytest.approx(np.array(expected), abs=1e-5)
    head = tuned.classifier.head
    assert (head.out.in_features, head.dense) == (65, None)
    assert tuned.parameter_counts()["head_parameters"] == 2 * 65 + 2


@pytest.mark.parametrize("model_type", BACKBONES)
def test_pairs_stacked_are_what_each_is_alone_whatever_the_padding(
    backbone_dir: Backbones, model_type: str
) -> None:
    tuned = built(backbone_dir(model_type))
    rows = encode_rows(tuned, [FIRST, SECOND], 128)
    together = compute_logits(tuned, rows)
    for row in range(4):
        alone = encode_rows(tuned, [[FIRST[row]], [SECOND[row]]], 128)
        assert compute_logits(tuned, alone)[0] == pytest.approx(together[row], abs=2e-5)
    assert len({tuple(row) for row in together.round(4).tolist()}) == 4
    swapped = compute_logits(tuned, encode_rows(tuned, [SECOND, FIRST], 128))
    assert swapped == pytest.approx(together, abs=2e-5)  # what it reads is symmetric


def test_rows_are_counted_selected_and_joined_with_both_texts(bert: Path) -> None:
    tuned = built(bert)
    rows = encode_rows(tuned, [FIRST, SECOND], 8)  # the second first text is cut
    each = [[len(tuned.tokenizer(text)["input_ids"]) for text in own] for own in (FIRST, SECOND)]
    cut = np.minimum(each, 8)
    assert len(rows) == 4
    assert rows.text_lengths.tolist() == cut.tolist()
    assert rows.lengths.tolist() == cut.sum(0).tolist()
    assert rows.widths.tolist() == (2 * cut.max(0)).tolist()
    assert rows.select([2, 0]).with_rows(rows.select([3])) == rows.select([2, 0, 3])
    assert rows.batch([1, 2], CPU)["input_ids"].shape == (4, 8)
    assert rows.each_text.lengths.tolist() == cut.flatten().tolist()


def test_a_batch_of_evaluation_stays_within_its_tokens_with_both_texts() -> None:
    widths = 2 * np.random.default_rng(0).integers(4, 128, 300)
    batches = list(by_length(widths))
    assert sorted(row for batch in batches for row in batch) == list(range(300))
    assert max(len(batch) * max(widths[batch]) for batch in batches) <= 4096


def test_gates_of_a_row_are_the_mean_over_its_texts(bert: Path) -> None:
    tuned = built(bert)
    _, of_pairs = compute_with_gates(tuned, encode_rows(tuned, [FIRST, SECOND], 128))
    single = build(experiment(bert, "unipelt-apl", model=APART), 2)
    single.classifier.backbone.load_state_dict(tuned.classifier.backbone.state_dict())
    each = [
        compute_with_gates(single, encode_rows(single, [texts], 128))[1]
        for texts in (FIRST, SECOND)
    ]
    for layer, gates in enumerate(of_pairs):
        assert set(gates) == {"adapter", "prefix", "lora"}
        for name, values in gates.items():
            expected = (each[0][layer][name] + each[1][layer][name]) / 2
            assert values == pytest.approx(expected, abs=1e-6)
            assert np.ptp(values) > 1e-4


@pytest.mark.parametrize(
    ("changes", "pairs", "expected"),
    [
        ({}, [True], "apart"),
        ({}, [False], "joint"),
        ({}, [False, True], "apart"),
        ({"pooling": "mean"}, [True], "apart"),
        ({"pooling": "cls"}, [True], "joint"),
        ({"pairs": "joint"}, [True], "joint"),
        ({"pairs": "apart", "pooling": "cls"}, [True], "apart"),
    ],
)
def test_auto_is_apart_on_a_sentence_encoder_read_as_it_was_trained(
    bert: Path, tmp_path: Path, changes: dict[str, Any], pairs: list[bool], expected: str
) -> None:
    encoder = sentence_encoder(tmp_path / "encoder", bert)
    outputs = [2] * len(pairs)
    assert build(experiment(encoder, "head", model=changes), outputs, pairs=pairs).pairs == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}, "apart"),
        ({"__version__": {"sentence_transformers": "2.0.0"}}, "apart"),
        ({"model_type": "CrossEncoder"}, "joint"),
        ({"model_type": "SparseEncoder"}, "joint"),
    ],
)
def test_a_pipeline_says_whether_its_vectors_are_compared(
    bert: Path, tmp_path: Path, kind: dict[str, Any], expected: str
) -> None:
    encoder = sentence_encoder(tmp_path / "encoder", bert)
    (encoder / "config_sentence_transformers.json").write_text(json.dumps(kind))
    assert build(experiment(encoder, "head"), 2, pairs=[True]).pairs == expected


def test_a_backbone_that_names_no_pooling_or_one_that_is_not_followed_is_joint(
    bert: Path, tmp_path: Path
) -> None:
    assert build(experiment(bert, "head"), 2, pairs=[True]).pairs == "joint"
    encoder = sentence_encoder(tmp_path / "encoder", bert)
    (encoder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    chosen = experiment(encoder, "head", model={"pooling": "mean"})
    assert build(chosen, 2, pairs=[True]).pairs == "joint"


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_joint_is_to_the_byte_what_it_was(bert: Path, pooling: str) -> None:
    settings = experiment(bert, "unipelt-apl", model={"pooling": pooling, "pairs": "joint"})
    joint, before = build(settings, 2, pairs=[True]), build(settings, 2)
    stored = before.stored()
    assert joint.stored().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in joint.stored().items())
    rows = encode_rows(joint, [FIRST, SECOND], 128)
    tokens = joint.tokenizer(FIRST, SECOND, truncation=True, max_length=128)
    assert (rows.ids, rows.types) == (tokens["input_ids"], tokens["token_type_ids"])
    assert joint.notes == ()


def test_of_several_tasks_pairs_alone_are_read_apart(bert: Path) -> None:
    settings = experiment(bert, "unipelt-apl", model=APART)
    tuned = build(settings, [2, 3], pairs=[True, False])
    assert tuned.classifier.apart == (True, False)
    assert [head.out.in_features for head in tuned.classifier.heads] == [65, 32]
    assert compute_logits(tuned, encode_rows(tuned, [FIRST, SECOND], 128), 0).shape == (4, 2)
    assert compute_logits(tuned, encode_rows(tuned, [SENTENCES], 128), 1).shape == (4, 3)


def test_a_run_says_how_pairs_are_read(bert: Path) -> None:
    settings = experiment(bert, "head", model=APART)
    assert build(settings, 2, pairs=[True]).notes == (
        "the two texts of a pair are read each by itself, and compared, as a sentence encoder "
        "reads them: --set model.pairs=joint reads both as one",
    )
    assert build(settings, 2, pairs=[False]).notes == (
        "model.pairs = 'apart' changes nothing here: a row has one text",
    )
