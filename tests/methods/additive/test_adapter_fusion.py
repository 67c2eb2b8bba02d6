"""AdapterFusion mixes the adapters of finished runs by attention."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.backbones import Backbones, save_backbone
from support.models import by_the_hooks, disturbed, experiment, logits_of, names_moved, tuned_of
from support.rows import SENTENCES, write_rows
from torch import Tensor

from unipelt_cli.errors import ConfigError
from unipelt_cli.files import sealed
from unipelt_cli.methods.additive.adapter_fusion import AdapterFusion, FusionLayer
from unipelt_cli.methods.base import StagePosition
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.names import MODEL
from unipelt_cli.runs.run import read_run
from unipelt_cli.training import execution
from unipelt_cli.training.events import Finished


@pytest.fixture(scope="module")
def adapter_runs(backbone_dir: Backbones, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Train the method `adapter` twice, and `lora` once; return the run directories."""
    root = tmp_path_factory.mktemp("sources")
    rows = write_rows(root / "rows.csv", 40)
    data = {"task": "own", "folds": 0, "train_file": str(rows), "text": "text", "label": "label"}
    found = []
    for seed, name in ((1, "adapter"), (2, "adapter"), (3, "lora")):
        train = {"epochs": 1, "learning_rate": 1e-2, "seed": seed}
        settings = experiment(backbone_dir("bert"), name, data=data, train=train)
        *_, last = execution.execute(settings, root / str(seed))
        assert isinstance(last, Finished)
        found.append(root / str(seed))
    return found


def fused_of(directory: Path, runs_: list[Path], **options: object) -> TunedModel:
    adapters = ",".join(map(str, runs_))
    return tuned_of(directory, "adapter-fusion", options={"adapters": adapters, **options})


def test_fusion_of_one_adapter_is_that_adapter(backbone_dir: Backbones) -> None:
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
    fused.method.enter_stage(backbone, 1)
    assert torch.allclose(logits_of(fused, SENTENCES), expected, atol=1e-4)
    identity = torch.full((32, 32), 1e-6).fill_diagonal_(1.0)
    assert all(torch.equal(layer.value, identity) for layer in backbone.fusion)
    for model in (fused, single):
        assert torch.equal(logits_of(model, SENTENCES), logits_of(model, SENTENCES))


def test_fusion_mixes_adapters_by_attention_of_each_token() -> None:
    generator = torch.Generator().manual_seed(5)
    layer = FusionLayer(8, 2, 2, generator)
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
    backbone_dir: Backbones, adapter_runs: list[Path], tmp_path: Path
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
    names = names_moved(tuned, epochs=2, learning_rate=1e-2, warmup=0.0)
    assert not any(".loaded." in name for name in names)
    assert {"backbone.fusion.0.own.up.weight", "backbone.fusion.1.query.weight"} <= names

    data = {"task": "own", "folds": 0, "train_file": str(tmp_path / "rows.csv"), "text": "text"}
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
    read_run(tmp_path / "fused").build()  # compares the probe's logits


def test_fusion_refuses_what_is_no_finished_adapter_of_this_backbone(
    backbone_dir: Backbones, adapter_runs: list[Path], tmp_path: Path
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


def test_fusion_pulls_its_values_to_the_identity(backbone_dir: Backbones) -> None:
    tuned = tuned_of(backbone_dir("bert"), "adapter-fusion")
    method, backbone = tuned.method, tuned.classifier.backbone
    assert isinstance(method, AdapterFusion)
    with torch.no_grad():
        backbone.fusion[0].value[2, 3] += 3.0
        backbone.fusion[1].value[1, 1] += 4.0
    one = torch.ones(())

    class Step:
        def __init__(self, stage: int) -> None:
            self.backbone, self.moment = backbone, StagePosition(stage, 0, 1)

        def forward(self) -> Tensor:
            return one

        def criterion(self, logits: Tensor) -> Tensor:
            return logits

    assert float(method.loss(Step(0))) == 1.0  # type: ignore[arg-type]
    assert float(method.loss(Step(1))) == pytest.approx(1 + 0.01 * 25, abs=1e-5)  # type: ignore[arg-type]
    assert not method.decays("fusion.0.value")
