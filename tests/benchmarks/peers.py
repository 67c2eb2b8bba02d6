"""The peers' side: the `adapters` library's trainer and model, and the bare library model.

AdapterTrainer needs accelerate: pip install accelerate
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import adapters
import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers import BertModel, DataCollatorWithPadding, TrainingArguments

from tests.benchmarks.contenders import BATCH, LENGTH, TASK, Lap, Rows, Work, timed
from unipelt_cli.system.row_threads import shared_out
from unipelt_cli.training.events import Labelled

PEERS = {"adapters, dynamic": False, "adapters, to 128": True}  # padding: always to 128?
Batches = Sequence[dict[str, Tensor]]


def peer_model(work: Work) -> Any:
    """Return the library's UniPELT with its defaults, and a classification head."""
    model = adapters.BertAdapterModel.from_pretrained(work.pretrained.directory)
    model.add_adapter(TASK, config=adapters.UniPELTConfig())
    model.add_classification_head(TASK, num_labels=2)
    model.train_adapter(TASK)
    return model


def peer_epoch(
    work: Work, model: Any, rows: Rows, scratch: str, *, is_padded: bool
) -> Callable[[], Lap]:
    """Return a call that trains and evaluates once with AdapterTrainer, as it comes."""
    tokenizer = work.pretrained.load_tokenizer()
    padding = {"padding": "max_length", "max_length": LENGTH} if is_padded else {"padding": True}
    trainer = adapters.AdapterTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=5e-4,
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=_dataset(rows.train),
        eval_dataset=_dataset(rows.dev),
        data_collator=DataCollatorWithPadding(tokenizer, **padding),
        compute_metrics=_accuracy,
    )
    trainer.remove_callback(transformers.PrinterCallback)  # stdout is ours

    def run() -> Lap:
        start, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        evaluation = trainer.state.log_history[0]["eval_runtime"]
        return Lap(seconds, cpu, seconds - evaluation, evaluation)

    return run


def _dataset(split: Labelled) -> Dataset:
    rows, labels = split
    columns = {
        "input_ids": rows.ids,
        "token_type_ids": rows.types,
        "attention_mask": [[1] * len(ids) for ids in rows.ids],
        "labels": labels.tolist(),
    }
    return Dataset.from_dict(columns)


def _accuracy(scored: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(scored.predictions.argmax(axis=1) == scored.label_ids))}


def bare_model(work: Work, precision: str, device: torch.device, batches: Batches) -> nn.Module:
    """Return the library's own encoder with the attention that is faster on some batches."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tried = []
    for attention in ("sdpa", "eager"):
        model = BertModel.from_pretrained(
            work.pretrained.directory,
            dtype=dtype,
            attn_implementation=attention,
            add_pooling_layer=False,
        )
        model.to(device).eval()
        forward(model, batches)
        tried.append((timed(lambda model=model: forward(model, batches)), len(tried), model))
    return min(tried)[-1]


def forward(model: nn.Module, batches: Batches) -> None:
    """Run a model over some batches."""
    with torch.inference_mode(), shared_out(getattr(model, "shares_rows", False)):
        for batch in batches:
            model(**batch)
