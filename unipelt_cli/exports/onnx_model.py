"""A run as one ONNX file, submodules and head in it, which ONNX Runtime runs without PyTorch.

Traced by torch's older exporter: the newer one (torch.export) took ten to thirty times as long on
the same models, and its bart computed something else for other lengths than the traced one.
What a trace bakes in by mistake is found by comparing on other sizes.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unipelt_cli.errors import RunError
from unipelt_cli.exports.job import Job, Writer, Written, labelled_config
from unipelt_cli.exports.parity import CPU, TOLERANCE, compare, padded
from unipelt_cli.files import atomic
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.classifier import Classifier
from unipelt_cli.text import first_line

MODEL, CONFIG, TOKENIZER = "model.onnx", "config.json", "tokenizer.json"
OPSET = 18
HALF_TOLERANCE = 0.05
"""In float16 trained runs were off by 0.002 to 0.02, with no label changed by it alone."""
TRACED = (0, 1)  # rows
SUFFIXES = ("", "_pair")  # of the inputs of a row's first text, and of a second one read apart


class _Graph(nn.Module):
    """A classifier that takes its inputs by place, as a graph does, a text after the other."""

    def __init__(self, classifier: Classifier, names: list[str], texts: int) -> None:
        super().__init__()
        self.classifier, self.names, self.texts = classifier, names, texts

    def forward(self, *tensors: Tensor) -> Tensor:
        count = len(self.names)
        pooled = [
            self.classifier.pooled(**dict(zip(self.names, inputs, strict=True)))
            for inputs in (tensors[text * count :][:count] for text in range(self.texts))
        ]
        joined = pooled[0] if self.texts == 1 else torch.cat(pooled)
        return self.classifier.read(self.classifier.combine(joined))


def plan(job: Job) -> Writer:
    """Return what writes the whole model, however its method works; the comparison decides."""
    return lambda directory: _write(job, directory)


def _write(job: Job, directory: Path) -> Written:
    rows = job.rows.encoded
    inputs = _by_name(rows.batch(TRACED, CPU), rows.texts)
    path = directory / MODEL
    _trace(job, inputs, path)
    if job.half:
        _halve(path)
    longest = job.run.experiment.model.max_length
    _write_tokenizer(job, longest, directory)
    settings = json.loads(labelled_config(job.run, job.tuned).to_json_string())
    atomic.write_json(directory / CONFIG, settings | {"max_length": longest})
    session = _session(path)

    def theirs(**batch: Tensor) -> Tensor:
        feeds = {name: tensor.numpy() for name, tensor in _by_name(batch, rows.texts).items()}
        return torch.from_numpy(session.run(None, feeds)[0])

    every = _with_edges(rows, longest)
    parity = compare(every, padded(every), job.tuned.classifier, theirs)
    return Written(
        parity,
        [f"{path.stat().st_size / 1e6:,.1f} MB, inputs {', '.join(inputs)}"],
        _snippet(job),
        HALF_TOLERANCE if job.half else TOLERANCE,
    )


def _by_name(batch: dict[str, Tensor], texts: int) -> dict[str, Tensor]:
    """Return a batch's tensors by the names of a graph's inputs: a second text has its own."""
    return {
        f"{name}{SUFFIXES[text_index]}": tensor.chunk(texts)[text_index]
        for text_index in range(texts)
        for name, tensor in batch.items()
    }


def _trace(job: Job, inputs: dict[str, Tensor], path: Path) -> None:
    """Write the graph of one pass; batch and length stay open."""
    names = list(inputs)
    traced = job.copy(accelerate=False).classifier.eval()
    texts = job.rows.encoded.texts
    lengths = [f"length{SUFFIXES[index * texts // len(names)]}" for index in range(len(names))]
    axes = {name: {0: "batch", 1: length} for name, length in zip(names, lengths, strict=True)}
    try:
        with torch.no_grad():
            torch.onnx.export(
                _Graph(traced, names[: len(names) // texts], texts),
                tuple(inputs.values()),
                str(path),
                input_names=names,
                output_names=["logits"],
                dynamic_axes={**axes, "logits": {0: "batch"}},
                opset_version=OPSET,
                dynamo=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise RunError(
            f"{job.run.directory}: its forward pass cannot be written as ONNX "
            f"({first_line(error)})",
            "export another method, or use another format",
        ) from None


def _halve(path: Path) -> None:
    """Write a graph's numbers as float16; what goes in and comes out keeps its kind.

    The head stays as it is: of a regression it holds numbers as large as the labels.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(path)
    head = [node.name for node in model.graph.node if "logits" in node.output]
    halved = convert_float_to_float16(model, keep_io_types=True, node_block_list=head)
    # It casts what the head says to float16 and back, which ends at 65,504.
    producers = {name: node for node in halved.graph.node for name in node.output}
    back = producers["logits"]
    narrowed = producers[back.input[0]]
    back.input[0] = narrowed.input[0]
    halved.graph.node.remove(narrowed)
    onnx.save(halved, path)


def _write_tokenizer(job: Job, longest: int, directory: Path) -> None:
    """Write the tokenizer with the run's way to cut and to pad in it, for use without us."""
    tokenizer = job.tuned.pretrained.load_tokenizer()
    backend = tokenizer.backend_tokenizer
    tokenizer.model_max_length = longest
    tokenizer.save_pretrained(directory)
    backend.enable_truncation(longest)
    backend.enable_padding(
        pad_id=job.rows.encoded.pad_id,
        pad_token=tokenizer.pad_token,
        length=job.rows.encoded.pad_to,
    )
    atomic.write(directory / TOKENIZER, backend.to_str(pretty=True).encode())


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # of float16 it warns that a CPU has no kernel to fold it with
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _with_edges(rows: Encoded, longest: int) -> Encoded:
    """Add a row of one token, of two, and of as many as it may have, beside other second texts."""
    counts = [1, 2, longest] if rows.texts == 1 else [1, 2, longest, longest, 1, 2]
    ids = [[*rows.ids[0]] * -(-count // len(rows.ids[0])) for count in counts]
    edges = [tokens[:count] for tokens, count in zip(ids, counts, strict=True)]
    types = None if rows.types is None else [[0] * len(tokens) for tokens in edges]
    return rows.with_rows(replace(rows, ids=edges, types=types))


_JOINT = """\
read = tokenizer.encode_batch(rows)
feeds = {"input_ids": [row.ids for row in read], "token_type_ids": [row.type_ids for row in read]}
feeds["attention_mask"] = [row.attention_mask for row in read]"""
_APART = f"""\
feeds = {{}}
for suffix, texts in zip({SUFFIXES!r}, zip(*rows)):  # each text by itself
    read = tokenizer.encode_batch(texts)
    feeds["input_ids" + suffix] = [text.ids for text in read]
    feeds["token_type_ids" + suffix] = [text.type_ids for text in read]
    feeds["attention_mask" + suffix] = [text.attention_mask for text in read]"""


def _snippet(job: Job) -> str:
    task = job.run.task
    rows = '[("one", "other"), ("a", "b")]' if task.is_pair else '["a row", "another"]'
    answer = "logits[:, 0]"
    if task.labels:
        answer = '[config["id2label"][str(place)] for place in logits.argmax(axis=1)]'
    return f"""\
# pip install onnxruntime tokenizers numpy; folder is the path of the one with this card
import json
from pathlib import Path
import numpy
import onnxruntime
from tokenizers import Tokenizer

folder, rows = {job.directory.name!r}, {rows}
config = json.loads(Path(folder, "{CONFIG}").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(f"{{folder}}/{TOKENIZER}")
session = onnxruntime.InferenceSession(f"{{folder}}/{MODEL}")
{_APART if job.rows.encoded.texts > 1 else _JOINT}
names = [own.name for own in session.get_inputs()]
logits = session.run(None, {{name: numpy.array(feeds[name]) for name in names}})[0]
print({answer})"""
