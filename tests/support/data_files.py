"""Files in the layouts that people have: GLUE's, their own, lines on stdin."""

import io

from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data import preparation, readers
from unipelt_cli.data.unusable import windows_of_texts
from unipelt_cli.tasks import TASKS

OWN = {"text": "text", "label": "label", "folds": 0}


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


TEXT = ["text"]
PAIR = ["question", "answer"]


def texts_of(windows, columns):
    """Return the texts of each column in all windows."""
    found = [part.texts for part in windows_of_texts(windows, [columns])]
    return [[text for one in found for text in one[column]] for column in columns]


def of_file(path, columns):
    return texts_of(readers.read_file(path, columns), columns)


def of_stdin(content, columns):
    return texts_of(readers.read_input(io.BytesIO(content), columns), columns)


def own_file(folder, rows=50, labels=("bad", "good"), name="own.csv"):
    lines = [f"message number {n},{labels[n % len(labels)]}" for n in range(rows)]
    return write(folder / name, "\n".join(["text,label", *lines]) + "\n")


def prepare_own(path, **settings):
    return preparation.prepare(DataSettings(train_file=str(path), **{**OWN, **settings}))


def glue_line(task, n):
    """Return one line of a task's made-up file, as GLUE has its columns."""
    pair = f"first {task} {n}\tsecond {n}"
    values = TASKS[task].source.values
    value = values[n % len(values)] if values else f"{n % 6}.250"
    return {
        "cola": f"gj04\t{value}\t\tsentence {n}",
        "sst2": f"a sentence {n} \t{value}",
        "mrpc": f"{value}\t{n}\t{n}\t{pair}",
        "stsb": f"{n}\tg\tf\ty\to\ts\ts\t{pair}\t{value}",
        "qqp": f"{n}\t{pair}\t{value}",
        "mnli": f"{n}\t{pair}\t{value}",
        "qnli": f"{n}\t{pair}\t{value}",
        "rte": f"{n}\t{pair}\t{value}",
    }[task]


HEADERS = {
    "sst2": "sentence\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\ts1\ts2\tsentence1\tsentence2\tscore",
    "qqp": "id\tquestion1\tquestion2\tis_duplicate",
    "mnli": "index\tsentence1\tsentence2\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
}
GLUE_TASKS = ["cola", *HEADERS]


def glue(root, task, train=60, dev=12, folder=None, end="\n"):
    source = TASKS[task].source
    for name, rows, start in (("train", train, 0), (source.dev, dev, 1000)):
        lines = [glue_line(task, start + n) for n in range(rows)]
        lines = [HEADERS[task], *lines] if task in HEADERS else lines
        write(root / (folder or source.folder) / f"{name}.tsv", end.join(lines) + end)
    return root


def prepare_glue(root, task, **settings):
    return preparation.prepare(DataSettings(task=task, source=str(root), **settings))
