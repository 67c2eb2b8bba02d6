"""Runs asked by command and from Python: windows, columns, shared passes."""

import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.backbones import WORDS
from support.command import FAST, error_of, invoke, rows_options

import unipelt_cli
from unipelt_cli.data import readers
from unipelt_cli.data.text_files import decoded_lines
from unipelt_cli.errors import DataError, RunError, UnipeltError
from unipelt_cli.models import sharing
from unipelt_cli.models.evaluation import compute_logits, encode_rows
from unipelt_cli.runs import loaded_runs, row_windows
from unipelt_cli.runs.run import read_run
from unipelt_cli.system import network
from unipelt_cli.tasks import get_task

METHODS = ("unipelt-apl", "unipelt-ap", "lora", "bitfit", "full", "head")


@pytest.fixture(scope="module")
def place(
    backbone_dir: Callable[[str], Path],
    rows_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a directory with runs of several methods, two of them of the same one."""
    root = tmp_path_factory.mktemp("predict")
    data = [
        *rows_options(rows_file),
        "--k",
        "24",
        "--dev-size",
        "12",
        "--model",
        str(backbone_dir("bert")),
    ]
    for name, method, seed in [*((m, m, 42) for m in METHODS), ("again", "unipelt-apl", 7)]:
        options = ["--method", method, "--seed", str(seed), "--set", "train.learning_rate=0.05"]
        code, _, stderr = invoke("train", *data, *FAST, *options, "--out", root / name)
        assert code == 0, stderr
    return root


def sentences(count: int) -> list[str]:
    """Return texts of one to forty words, in an order that is not that of their lengths."""
    random = np.random.default_rng(3)
    return [" ".join(random.choice(WORDS, random.integers(1, 41))) for _ in range(count)]


def as_before(run: Path, texts: list[str]) -> list[dict[str, float]]:
    """Label texts all at once, without what is tried here."""
    found = read_run(run)
    tuned = found.build()
    logits = compute_logits(tuned, encode_rows(tuned, [texts], 128)).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return [dict(zip(found.task.labels, own.tolist(), strict=True)) for own in shares]


def probabilities(stdout: str) -> list[dict[str, float]]:
    return [json.loads(line)["probabilities"] for line in stdout.splitlines()]


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def write(path: Path, texts: list[str]) -> Path:
    """Write texts in the format that the path's suffix names, beside a column of no use."""
    columns = {"id": list(range(len(texts))), "text": texts}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=100)
    elif path.suffix == ".jsonl":
        rows = [json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)]
        path.write_text("\n".join(rows) + "\n")
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        rows = [f"{n}{mark}{text}" for n, text in enumerate(texts)]
        path.write_text("\n".join([f"id{mark}text", *rows]) + "\n")
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_windows_change_neither_answers_nor_their_order(
    place: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = sentences(150)
    path = write(tmp_path / f"rows.{suffix}", texts)
    expected = as_before(place / "unipelt-apl", texts)
    sizes: list[int] = []
    predict = loaded_runs.LoadedRuns.predict_columns

    def seen(self: Any, columns: Any) -> Any:
        sizes.append(len(columns["text"]))
        return predict(self, columns)

    monkeypatch.setattr(loaded_runs.LoadedRuns, "predict_columns", seen)
    monkeypatch.setattr(readers, "FIRST_WINDOW", 8)
    monkeypatch.setattr(readers, "LARGEST_WINDOW", 32)
    code, stdout, stderr = invoke("predict", place / "unipelt-apl", path)
    assert (code, stderr) == (0, "")
    first = [32] if suffix == "parquet" else [8]
    assert sizes[:1] == first
    assert max(sizes) == 32
    assert sum(sizes) == 150
    assert_close(probabilities(stdout), expected)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (None, "good film\nawful\n"),
        (None, '{"text": "good film"}\n{"text": "awful"}\n'),
        (None, "id,text\n1,good film\n2,awful\n"),
        (None, '"text","id"\n"good film",1\nawful,2\n'),
        (None, "text\tid\ngood film\t1\nawful\t2\n"),
        ("csv", "text\ngood film\nawful\n"),
        ("tsv", "text\ngood film\nawful\n"),
        ("jsonl", '{"text": "good film"}\n{"text": "awful"}\n'),
    ],
)
def test_stdin_says_what_it_holds_or_is_told(place: Path, kind: str | None, content: str) -> None:
    options = ["--format", kind] if kind else []
    code, stdout, stderr = invoke("predict", place / "lora", "-", *options, stdin=content)
    note = "note: stdin: nothing looks like a table, so each line is a text; --format lines says so"
    expected = [note] if content.startswith("good") else []
    assert (code, " ".join(stderr.split()).splitlines()) == (0, expected)
    assert_close(probabilities(stdout), as_before(place / "lora", ["good film", "awful"]))


def test_a_first_line_that_only_looks_like_a_header_is_text_if_that_is_said(place: Path) -> None:
    options = ("--format", "lines")
    code, stdout, _ = invoke("predict", place / "lora", "-", *options, stdin="id,text\nfine\n")
    assert (code, len(stdout.splitlines())) == (0, 2)


def test_a_file_may_be_of_another_format_than_its_name_says(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("good film\n\nawful\n")
    message, hint = error_of("predict", place / "lora", path)
    assert message == f"{path}: unknown file type '.txt'"
    assert hint.startswith("give .csv, .tsv, .jsonl, .parquet: rename it")
    code, stdout, _ = invoke("predict", place / "lora", path, "--format", "lines")
    assert (code, len(stdout.splitlines())) == (0, 2)
    message, hint = error_of("predict", place / "lora", path, "--format", "json")
    assert message == "--format 'json': no such format"
    assert hint.startswith("did you mean jsonl?")


class Talk:
    """A command that is given lines, and asked for answers, one by one."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "unipelt_cli", "predict", *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
        self.pool = ThreadPoolExecutor(2)

    def tell(self, text: str) -> None:
        self.stdin.write(text)
        self.stdin.flush()

    def hear(self) -> Any:
        """Return the next answer; a test fails where none comes."""
        return json.loads(self.pool.submit(self.process.stdout.readline).result(60))

    @property
    def stdin(self) -> IO[str]:
        return self.process.stdin  # type: ignore[no-any-return]

    def end(self) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stdout, stderr


def test_every_line_is_answered_before_the_next_one_is_written(place: Path) -> None:
    talk = Talk(place / "lora", "-", "--offline")
    texts = ["good film", "awful", "the red cat", "fine"]
    lines_of = [json.dumps({"text": text}) for text in texts]
    heard = []
    talk.tell(lines_of[0] + "\n")
    heard.append(talk.hear())
    talk.tell(lines_of[1] + "\n" + lines_of[2][:7])  # a line whose end is not there yet
    heard.append(talk.hear())
    talk.tell(lines_of[2][7:] + "\n")
    heard.append(talk.hear())
    talk.tell(lines_of[3] + '\n{"body": "fine"}\n{"text": "fine"}\n')
    heard.append(talk.hear())
    assert_close([one["probabilities"] for one in heard], as_before(place / "lora", texts))
    code, stdout, stderr = talk.end()
    assert (code, stdout) == (2, "")
    assert stderr.splitlines() == [
        "error: stdin, line 5: 'text' is missing",
        "hint: fill it in, or have such rows answered with null by --skip-unusable",
    ]


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("a.csv", b"5,\n6,x\n", "line 102: 'text' is empty"),
        ("a.csv", b"5\n", "line 102: 1 fields, where the first line has 2"),
        ("a.csv", b'5,"x\n', "line 102: malformed CSV (unexpected end of data)"),
        ("a.tsv", b"5\tcaf\xe9\n", "line 102: not UTF-8 (byte 0xe9 at offset {offset})"),
        ("a.jsonl", b"nothing\n", "line 101: malformed JSON (Expecting value: line 1 column 1"),
        ("a.jsonl", b'{"text": []}\n', "line 101: 'text' is not text but list"),
    ],
)
def test_rows_before_a_bad_one_of_a_file_are_written(
    place: Path, tmp_path: Path, name: str, bad: bytes, message: str
) -> None:
    path = write(tmp_path / name, sentences(100))
    before = path.read_bytes()
    path.write_bytes(before + bad)
    code, stdout, stderr = invoke("predict", place / "head", path)
    assert (code, len(stdout.splitlines())) == (2, 100)
    expected = message.format(offset=len(before) + 5)
    assert stderr.startswith(f"error: {path}, {expected}"), stderr
    assert len(stderr.splitlines()) == 2


def test_a_long_line_is_refused_with_its_number(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_lines, "LONGEST_LINE", 2**19)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": "' + "x" * 2**20 + '"}\n')
    code, stdout, stderr = invoke("predict", place / "head", path)
    assert (code, len(stdout.splitlines())) == (2, 1)
    assert stderr.splitlines()[0] == f"error: {path}, line 2: longer than 524288 bytes"


def test_answers_go_to_a_file_that_is_whole_or_not_there(place: Path, tmp_path: Path) -> None:
    rows, out = write(tmp_path / "a.jsonl", sentences(20)), tmp_path / "answers.jsonl"
    assert invoke("predict", place / "lora", rows, "--out", out) == (0, "", "")
    assert out.read_text() == invoke("predict", place / "lora", rows)[1]
    out.unlink()
    rows.write_text(rows.read_text() + "{\n")
    error_of("predict", place / "lora", rows, "--out", out)
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(
    place: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LARGEST_WINDOW", 256)
    monkeypatch.setattr(decoded_lines, "PIECE", 2**12)
    peaks = []
    for count in (500, 500, 3000):  # the first one warms caches
        path = write(tmp_path / f"a.{suffix}", [f"good {row}" for row in range(count)])
        out = tmp_path / "out.jsonl"
        tracemalloc.start()
        assert invoke("predict", place / "head", path, "--out", out)[0] == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(out.read_text().splitlines()) == count
    file = path.stat().st_size if suffix == "parquet" else 0  # whose packed bytes are held
    assert peaks[2] < 1.1 * peaks[1] + file, peaks


# Several runs


def asked(place: Path, *names: str) -> list[str | Path]:
    return [part for name in names for part in ("--run", place / name)]


def test_runs_asked_together_say_what_each_says_alone(place: Path, tmp_path: Path) -> None:
    texts = sentences(60)
    path = write(tmp_path / "a.csv", texts)
    names = [*reversed(METHODS), "again"]
    code, stdout, stderr = invoke("predict", *asked(place, *names), path)
    assert (code, stderr) == (0, "")
    rows = [json.loads(line)["runs"] for line in stdout.splitlines()]
    assert [list(row) for row in rows] == [names] * 60
    different = set()
    for name in names:
        expected = as_before(place / name, texts)
        assert_close([row[name]["probabilities"] for row in rows], expected)
        different.add(round(expected[0]["yes"], 6))
    assert len(different) == len(names), "runs that say the same show nothing"


@pytest.mark.parametrize("device_rows", ["ragged", "padded"])
def test_runs_of_one_method_share_passes(
    place: Path, device_rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device_rows == "padded":  # as on a GPU: one part, with the rows of every run
        monkeypatch.setattr(
            "unipelt_cli.methods.unipelt.fused.batching.shares_out", lambda device: False
        )
    loaded = unipelt_cli.load_runs([place / n for n in ("unipelt-apl", "lora", "again")])
    passes: list[int] = []
    answer = sharing.answer

    def seen(tuned: Any, inputs: Any) -> Any:
        passes.append(len(tuned))
        return answer(tuned, inputs)

    monkeypatch.setattr(sharing, "answer", seen)
    texts = sentences(30)
    together_said = loaded.predict(texts)
    assert passes == [2]
    for name in ("unipelt-apl", "again"):
        found = [row[name].probabilities for row in together_said]
        alone = [one.probabilities for one in loaded[name].predict(texts)]
        assert_close(found, as_before(place / name, texts))  # type: ignore[arg-type]
        assert_close(found, alone)  # type: ignore[arg-type]
    assert passes == [2]


@pytest.mark.parametrize("order", [METHODS, tuple(reversed(METHODS))])
def test_the_backbone_is_held_once(place: Path, order: tuple[str, ...]) -> None:
    loaded = unipelt_cli.load_runs([place / name for name in (*order, "again")])
    seen: dict[str, set[int]] = {}
    for name, one in loaded.items():
        for key, parameter in one.tuned.classifier.backbone.named_parameters():
            if name != "full" and not key.startswith("submodules") and "bias" not in key:
                seen.setdefault(key, set()).add(parameter.data_ptr())
    assert len({id(one.tuned.tokenizer) for one in loaded.values()}) == 1
    assert len(seen) > 20
    assert {key for key, places in seen.items() if len(places) > 1} == set()
    stacks = [loaded[n].tuned.classifier.backbone.submodules.stack for n in ("again", "lora")]
    assert stacks[0].layers is stacks[1].layers
    assert all(layer.is_current for layer in stacks[0].layers)


def test_runs_that_read_other_columns_take_their_own(
    place: Path, rows_file: Path, backbone_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    body = tmp_path / "body.csv"
    body.write_text(rows_file.read_text().replace("text,label", "body,score", 1))
    options = ["--train-file", body, "--text", "body", "--label", "score", "--k", "24"]
    out = tmp_path / "body"
    model = ["--model", backbone_dir("bert"), "--method", "head", "--dev-size", "12"]
    assert invoke("train", *options, *model, *FAST, "--out", out)[0] == 0
    both = ["--run", place / "lora", "--run", out]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good", "body": "awful"}\n')
    answer = json.loads(invoke("predict", *both, rows)[1])["runs"]
    assert answer["lora"]["probabilities"] == pytest.approx(
        as_before(place / "lora", ["good"])[0], abs=1e-5
    )
    assert answer["body"]["probabilities"] == pytest.approx(as_before(out, ["awful"])[0], abs=1e-5)
    plain = json.loads(invoke("predict", *both, "-", stdin="good\n")[1])["runs"]
    assert_close([plain["lora"]["probabilities"]], [answer["lora"]["probabilities"]])
    rows.write_text('{"text": "good"}\n')
    assert error_of("predict", *both, rows)[0] == f"{rows}: no column 'body'"


def test_lines_without_names_that_fill_no_columns_are_refused() -> None:
    content = io.BytesIO(b"good\tbad\n")
    with pytest.raises(DataError) as caught:
        list(readers.read_input(content, ["text", "a", "b"], plain=[]))
    assert caught.value.message == "stdin: lines without names, and the runs read different columns"
    assert caught.value.hint == (
        "give JSON lines, or CSV or TSV, with the columns 'text', 'a', 'b'"
    )
    task = get_task("sst2")
    loaded = [
        loaded_runs.LoadedRun(SimpleNamespace(tasks=(own,)), None)
        for own in (task, get_task("mrpc"))
    ]  # type: ignore[arg-type]
    several = loaded_runs.LoadedRuns(dict(zip("ab", loaded, strict=True)))
    assert several.columns == ["sentence", "sentence1", "sentence2"]
    assert several.plain == []
    with pytest.raises(DataError, match="rows, row 0: one text"):
        several.predict(["good"])


def test_what_runs_cannot_be_asked_together_is_said(
    place: Path, rows_file: Path, backbone_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    data = [*rows_options(rows_file), "--k", "24", "--dev-size", "12", "--method", "head", *FAST]
    assert invoke("train", *data, "--model", backbone_dir("distilbert"), "--out", other)[0] == 0
    message, hint = error_of("predict", "--run", place / "lora", "--run", other, "-")
    assert message == (
        f"{other}: trained on the backbone {backbone_dir('distilbert')}, and {place / 'lora'} "
        f"on {backbone_dir('bert')} (or other files of it)"
    )
    assert hint == "ask runs on one backbone together, and the others by themselves"
    message, hint = error_of("predict", *asked(place, "lora", "lora"), "-")
    assert (message, hint) == (f"--run {place / 'lora'}: given twice", "give each run once")
    message, hint = error_of("predict", place / "lora", "-", "--run", place / "head")
    assert message == f"RUN {place / 'lora'} and --run contradict each other"
    message, hint = error_of("predict", place / "lora")
    assert (message, hint) == (
        "predict: there is no FILE|-",
        "name a file of rows, or - for stdin",
    )


def test_runs_that_are_called_alike_are_called_by_their_paths() -> None:
    found = loaded_runs.named(["a/run", "b/run", "c/other/"])
    assert found == {"a/run": "a/run", "b/run": "b/run", "other": "c/other/"}


# From Python


@pytest.fixture(scope="module")
def loaded(place: Path) -> loaded_runs.LoadedRun:
    return unipelt_cli.load_run(place / "unipelt-apl")


def test_a_program_labels_texts_and_mappings(place: Path, loaded: loaded_runs.LoadedRun) -> None:
    texts = sentences(12)
    found = loaded.predict(texts)
    expected = as_before(place / "unipelt-apl", texts)
    assert_close([one.probabilities for one in found], expected)  # type: ignore[arg-type]
    assert [one.label for one in found] == [max(own, key=own.get) for own in expected]  # type: ignore[arg-type]
    assert found[0].value is None
    assert loaded.predict(iter([{"text": text, "id": 4} for text in texts])) == found
    assert loaded.labels == ("no", "yes")
    assert loaded.task.text == ("text",)
    logits = loaded.logits(texts)
    assert (logits.shape, logits.dtype) == ((12, 2), np.float32)
    assert loaded.predict([]) == []
    assert loaded.logits([]).shape == (0, 2)
    assert loaded.gates([]) == []


def test_a_program_sees_gates(place: Path, loaded: loaded_runs.LoadedRun) -> None:
    texts = sentences(5)
    gates = loaded.gates(texts)
    assert [set(layer) for layer in gates] == [{"adapter", "prefix", "lora"}] * 2
    assert all(values.shape == (5,) for layer in gates for values in layer.values())
    one = loaded.gates(texts[3:4])
    assert one[1]["lora"][0] == pytest.approx(gates[1]["lora"][3], abs=1e-5)
    with pytest.raises(RunError, match="method 'lora' has no gates"):
        unipelt_cli.load_run(place / "lora").gates(texts)


@pytest.mark.parametrize(
    ("rows", "message", "hint"),
    [
        ("good", "the rows are one text, not a list of them", "put what is to be labelled"),
        ({"text": "good"}, "the rows are of type dict, not a list", "put what is to be labelled"),
        (None, "the rows are of type NoneType, not a list", "put what is to be labelled"),
        (["good", 3], "rows, row 1: of type int", "give a mapping with 'text', or a text"),
        (["good", None], "rows, row 1: of type NoneType", "give a mapping with 'text', or a text"),
        ([("a", "b")], "rows, row 0: 2 texts", "give a mapping with 'text', or a text"),
        ([{"body": "a"}], "rows, row 0: 'text' is missing", "fill it in, or drop the row"),
        (["a", " "], "rows, row 1: 'text' is empty", "fill it in, or drop the row"),
        ([{"text": b"a"}], "rows, row 0: 'text' is not text but bytes", "give a string"),
        ([{"text": ["a"]}], "rows, row 0: 'text' is not text but list", "give a string"),
    ],
)
def test_rows_that_are_none_are_told_in_two_sentences(
    loaded: loaded_runs.LoadedRun, rows: Any, message: str, hint: str
) -> None:
    for ask in (loaded.predict, loaded.logits, loaded.gates):
        with pytest.raises(DataError) as caught:
            ask(rows)
        assert caught.value.message.startswith(message)
        assert caught.value.hint.startswith(hint)


def test_rows_are_counted_over_windows(
    loaded: loaded_runs.LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_windows, "WINDOW", 4)
    texts = sentences(10)
    found = loaded.predict(texts)
    monkeypatch.setattr(row_windows, "WINDOW", 4096)
    assert_close(
        [one.probabilities for one in found],  # type: ignore[arg-type]
        [one.probabilities for one in loaded.predict(texts)],  # type: ignore[arg-type]
    )
    monkeypatch.setattr(row_windows, "WINDOW", 4)
    with pytest.raises(DataError, match="rows, row 9: 'text' is empty"):
        loaded.predict([*texts[:9], ""])


def test_threads_may_share_runs(place: Path) -> None:
    several = unipelt_cli.load_runs([place / name for name in ("unipelt-apl", "again", "full")])
    texts = sentences(40)
    expected = several.predict(texts)
    begin = threading.Barrier(6)

    def ask(number: int) -> Iterator[tuple[Any, Any]]:
        begin.wait(60)
        for row in range(number, 40, 6):
            name = list(several)[row % 3]
            yield several[name].predict(texts[row : row + 1])[0], expected[row][name]
            several[name].gates(texts[:2]) if name == "again" else None

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: list(ask(number)), range(6)))
    for one, other in (pair for each in found for pair in each):
        assert one.label == other.label
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_a_missing_run_or_backbone_is_told_in_two_sentences(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        unipelt_cli.load_run(tmp_path)
    with pytest.raises(UnipeltError, match="not in the local cache"):
        unipelt_cli.load_run(place / "lora", model="nobody/nothing")
    with pytest.raises(UnipeltError, match="no run was given"):
        unipelt_cli.load_runs([])


def test_loading_asks_no_network_for_what_is_here(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(network, "configure_network", refuse)
    before = dict(os.environ)
    assert unipelt_cli.load_run(place / "head").labels
    assert dict(os.environ) == before


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, unipelt_cli\n"
        "print(sorted({'torch', 'numpy', 'unipelt_cli.runs.loaded_runs'} & sys.modules.keys()))\n"
        "try: unipelt_cli.load_rum\n"
        "except AttributeError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "[]",
        "module 'unipelt_cli' has no attribute 'load_rum'",
    ]


def test_a_forked_process_answers_though_threads_and_a_pass_stayed_behind(place: Path) -> None:
    """As a server does that loads before it forks: torch's threads are in the parent alone."""
    code = (
        "import multiprocessing, sys\n"
        "import torch, unipelt_cli\n"
        "from unipelt_cli.runs import loaded_runs\n"
        "torch.set_num_threads(2)\n"
        "matrix = torch.ones(1000, 1000)\n"
        "matrix @ matrix  # threads begin\n"
        "run = unipelt_cli.load_run(sys.argv[1])\n"
        "texts = ['good film', 'the plot was awful'] * 40\n"
        "expected = [answer.label for answer in run.predict(texts)]\n"
        "def ask(answers):\n"
        "    answers.put([answer.label for answer in run.predict(texts)] == expected)\n"
        "context = multiprocessing.get_context('fork')\n"
        "answers = context.Queue()\n"
        "child = context.Process(target=ask, args=(answers,))\n"
        "with loaded_runs._TURN:\n"
        "    child.start()\n"
        "child.join(40)\n"
        "child.kill()\n"
        "print(child.exitcode, child.exitcode == 0 and answers.get())\n"
    )
    command = [sys.executable, "-c", code, str(place / "unipelt-apl")]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout.split() == ["0", "True"]
