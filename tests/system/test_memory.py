"""What does not fit into memory at once is computed in parts, and said."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.backbones import save_backbone
from support.models import experiment

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.errors import RunError
from unipelt_cli.files import sealed
from unipelt_cli.models.classifier import Classifier
from unipelt_cli.models.evaluation import compute_logits
from unipelt_cli.runs.names import MODEL
from unipelt_cli.runs.run import read_run
from unipelt_cli.system import memory
from unipelt_cli.training import execution
from unipelt_cli.training.events import BatchHalved, Epoch
from unipelt_cli.training.planning import RowCache

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    RuntimeError("could not create a primitive"),
]


def planned(backbone: Path, rows_file: Path, seed: int = 42) -> Experiment:
    rows = {
        "task": None,
        "folds": 0,
        "train_file": str(rows_file),
        "text": "text",
        "label": "label",
        "k": 24,
    }
    return experiment(
        backbone,
        "unipelt-apl",
        data=rows,
        options={"prefix_length": 3, "prefix_width": 8, "rank": 2},
        train={"epochs": 2, "batch_size": 8, "seed": seed},
    )


def holding(
    monkeypatch: pytest.MonkeyPatch, rows: int, error: BaseException, *, only_training: bool = True
) -> None:
    """Let a pass of more rows than these run out of memory."""
    pooled = Classifier.pooled

    def limited(
        self: Classifier, attention_mask: torch.Tensor, **inputs: torch.Tensor
    ) -> torch.Tensor:
        if len(attention_mask) > rows and (self.training or not only_training):
            raise error
        return pooled(self, attention_mask, **inputs)

    monkeypatch.setattr(Classifier, "pooled", limited)


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python", "onednn"])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    holding(monkeypatch, 3, error)
    events = list(execution.execute(planned(bert, rows_file), tmp_path / "run"))
    assert [event for event in events if isinstance(event, BatchHalved)] == [
        BatchHalved(4, compares_rows=True),
        BatchHalved(2, compares_rows=True),
    ]
    assert read_run(tmp_path / "run").result["micro_batch_size"] == 2


def test_parts_add_up_to_the_whole_step(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a loss that is a mean over rows: one that compares them does so within a part."""
    zero = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    calm = planned(save_backbone(tmp_path / "calm", "bert", **zero), rows_file)
    calm = calm.with_("train", contrast=0.0)
    losses = []
    for name, limit in (("whole", 99), ("parts", 3)):
        with monkeypatch.context() as patch:
            holding(patch, limit, ERRORS[0])
            events = list(execution.execute(calm, tmp_path / name))
        assert not any(event.compares_rows for event in events if isinstance(event, BatchHalved))
        losses.append([event.train_loss for event in events if isinstance(event, Epoch)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    tensors = [sealed.open_tensors(tmp_path / n / MODEL)[0] for n in ("whole", "parts")]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][name], rtol=1e-3, atol=1e-5)


def test_a_run_in_parts_goes_on_exactly(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding(monkeypatch, 3, ERRORS[0])
    plan = planned(bert, rows_file)
    for _ in execution.execute(plan, tmp_path / "whole"):
        pass
    events = execution.execute(plan, tmp_path / "run")
    for _ in range(5):  # ready, halved twice, and two steps
        next(events)
    events.close()
    later = list(execution.execute(plan, tmp_path / "run", "resume"))
    assert not any(isinstance(event, BatchHalved) for event in later)
    models = [(tmp_path / name / MODEL).read_bytes() for name in ("whole", "run")]
    assert models[0] == models[1]


def test_evaluation_is_halved_as_well_and_computes_the_same(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in execution.execute(planned(bert, rows_file), tmp_path / "run"):
        pass
    run = read_run(tmp_path / "run")
    tuned = run.build()
    rows = RowCache().encode(tuned, run.prepared(), "test", run.experiment)
    whole = compute_logits(tuned, rows)
    holding(monkeypatch, 1, ERRORS[0], only_training=False)
    np.testing.assert_allclose(compute_logits(tuned, rows), whole, atol=1e-5)
    holding(monkeypatch, 0, ERRORS[0], only_training=False)
    with pytest.raises(RunError, match="not even one row fits into memory"):
        compute_logits(tuned, rows)


def test_one_row_that_does_not_fit_is_an_error_of_two_sentences(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding(monkeypatch, 0, ERRORS[0])
    with pytest.raises(RunError, match="not even one row fits into memory"):
        list(execution.execute(planned(bert, rows_file), tmp_path / "run"))


def test_other_errors_of_a_step_are_not_taken_for_a_lack_of_memory(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding(monkeypatch, 3, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(execution.execute(planned(bert, rows_file), tmp_path / "run"))


def test_runs_that_do_not_fit_together_go_on_alone(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [planned(bert, rows_file, seed) for seed in (1, 2, 3)]
    for number, plan in enumerate(plans):
        with monkeypatch.context() as patch:
            holding(patch, 4, ERRORS[0])
            for _ in execution.execute(plan, tmp_path / f"alone{number}"):
                pass
    holding(monkeypatch, 4, ERRORS[0])
    directories = [tmp_path / f"run{number}" for number in range(3)]
    events = list(execution.execute_together(plans, directories))
    halved = [(place, e.micro_batch_size) for place, e in events if isinstance(e, BatchHalved)]
    assert sorted(halved) == [(0, 4), (1, 4), (2, 4)]
    for number, directory in enumerate(directories):
        expected = (tmp_path / f"alone{number}" / MODEL).read_bytes()
        assert (directory / MODEL).read_bytes() == expected


def test_a_batch_that_may_not_fit_is_doubted_before_training(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(bert, rows_file)
    assert next(execution.execute(plan, tmp_path / "a")).doubt is None
    free = 1_000_000  # enough for the backbone
    monkeypatch.setattr(memory, "available", lambda device: free)
    plan = plan.with_("train", batch_size=24)
    doubt = next(execution.execute(plan, tmp_path / "b")).doubt
    assert doubt.startswith("a batch of 24 rows of ")
    assert doubt.endswith("are free: lower train.batch_size or model.max_length")
