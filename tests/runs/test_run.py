"""A run that is not what it says is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import error_of, invoke
from support.runs import reseal

from unipelt_cli.files import sealed


def damage_version(directory: Path) -> None:
    path = directory / "model.safetensors"
    sealed.write_tensors(path, load_file(path), {"format_version": 99})
    reseal(directory)


def change(
    edit: Callable[[dict[str, torch.Tensor]], object], seals: bool = True
) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors, header = sealed.open_tensors(path)
        edit(tensors)
        if seals:
            del header["sha256"]
            sealed.write_tensors(path, tensors, header)
        else:
            save_file(tensors, path, {"unipelt": json.dumps(header)})
        reseal(directory)

    return damage


def replace_file(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).write_bytes(content)
        reseal(directory)

    return damage


BIAS = "head.out.bias"


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (damage_version, "model.safetensors: format 99, this unipelt reads up to 1"),
    (change(lambda t: t.pop(BIAS)), "model.safetensors: tensor head.out.bias is missing"),
    (
        change(lambda t: t.update(extra=torch.zeros(1))),
        "model.safetensors: tensor extra is not part of this method",
    ),
    (
        change(lambda t: t.update({BIAS: torch.zeros(3)})),
        "model.safetensors: tensor head.out.bias is (3,), not (2,)",
    ),
    (
        change(lambda t: t.update({BIAS: torch.zeros(2, dtype=torch.float64)})),
        "model.safetensors: tensor head.out.bias is torch.float64, not float32",
    ),
    (
        change(lambda t: t.update({BIAS: torch.full((2,), float("nan"))})),
        "model.safetensors: tensor head.out.bias holds numbers that are not finite",
    ),
    (
        change(lambda t: t[BIAS].add_(1), seals=False),
        "model.safetensors: its tensors are not those that were written",
    ),
    (
        replace_file("model.safetensors", b"\x10" * 100),
        "model.safetensors: missing, damaged, or not written by unipelt",
    ),
    (
        lambda d: (d / "model.safetensors").write_bytes(b"\x10" * 100),
        "model.safetensors: changed since it was written",
    ),
    (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: missing or damaged"),
    (replace_file("environment.json", b"[]"), "environment.json: missing or damaged"),
    (
        replace_file("environment.json", b"{}"),
        "environment.json: damaged, backbone: field required",
    ),
    (
        lambda d: (d / "result.json").write_text('{"metric": "f1"}'),
        "result.json: damaged, dev: field required",
    ),
    (lambda d: (d / "result.json").unlink(), ": unfinished, stopped after epoch 3"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[text for _, text in DAMAGE])
def test_a_damaged_run_is_refused(
    copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy)
    said, hint = error_of("eval", copy)
    separator = "" if message.startswith(":") else "/"
    assert said == f"{copy}{separator}{message}"
    assert hint


def test_another_backbone_is_refused_with_both_names(
    copy: Path, bert: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(bert, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    text = (copy / "experiment.toml").read_text()
    (copy / "experiment.toml").write_text(text.replace(str(bert), str(other)))
    reseal(copy)
    message, hint = error_of("eval", copy)
    assert message.startswith(f"{copy}: trained on backbone {bert} (")
    assert f"but {other} is (" in message
    assert message.endswith(": other model.safetensors")
    assert hint == "give the backbone that the run was trained on with --model"


@pytest.mark.parametrize(
    ("old", "new"), [('pooling = "native"', 'pooling = "cls"'), ("rank = 32", "rank = 32")]
)
def test_a_run_that_computes_something_else_is_refused(copy: Path, old: str, new: str) -> None:
    path = copy / "experiment.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    reseal(copy)
    if old == new:
        assert invoke("eval", copy)[0] == 0
        return
    message, hint = error_of("eval", copy)
    assert message.startswith(f"{copy}: computes other logits than when it was saved")
    assert hint == "its settings or a library have changed: restore them, or train it again"
