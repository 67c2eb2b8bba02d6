"""Switches set before anything is imported, and fixtures that every folder uses."""

import os

for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[switch] = "1"
os.environ.pop("UNIPELT_DATA", None)
# Tiny tensors gain nothing from threads, and spin when something else wants the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
from pathlib import Path

import pytest
import torch
from support.backbones import VARIANTS, Backbones, save_backbone
from support.command import FAST, invoke, rows_options
from support.rows import write_rows

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    """Return the directory of a tiny backbone by model type, made on first use."""
    root = tmp_path_factory.mktemp("backbones")

    def find(model_type: str) -> Path:
        directory = root / model_type
        if directory.exists():
            return directory
        kind, changes = VARIANTS.get(model_type, (model_type, {}))
        return save_backbone(directory, kind, **changes)

    return find


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a CSV file of 60 made-up reviews, text and label."""
    return write_rows(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests: the last one must not run alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def bert(backbone_dir: Backbones) -> Path:
    """Return the directory of the tiny BERT, which tests must not change."""
    return backbone_dir("bert")


@pytest.fixture
def bert_copy(backbone_dir: Backbones, tmp_path: Path) -> Path:
    """Return a copy of the tiny BERT that a test may damage."""
    return Path(shutil.copytree(backbone_dir("bert"), tmp_path / "bert"))


@pytest.fixture(scope="session")
def run(bert: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of the default method on own data; tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "first"
    code, _, stderr = invoke(
        "train", *rows_options(rows_file), "--k", "24", "--model", bert, *FAST, "--out", out
    )
    assert code == 0, stderr
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture(scope="session")
def calm_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a backbone without dropout, on which learning does not depend on luck."""
    directory = tmp_path_factory.mktemp("calm") / "bert"
    return save_backbone(
        directory, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
