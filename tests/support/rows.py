"""Made-up rows that a tiny model can learn, and files of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from support.backbones import WORDS


def write_rows(path: Path, count: int = 60, start: int = 0) -> Path:
    """Write made-up reviews of two classes that a tiny model can learn, as CSV."""
    lines = ["text,label"]
    for row in range(start, start + count):
        word, label = (("good", "yes"), ("awful", "no"))[row % 2]
        filler = " ".join(WORDS[(row * step) % len(WORDS)] for step in range(1, 3 + row % 5))
        lines.append(f"the film {row} was {word} {filler},{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


SENTENCES = ["good film", "the plot was very bad but the cat sat on the red mat", "fine", "a b c"]

ORDER_WORDS = (
    "parcel",
    "late",
    "refund",
    "money",
    "card",
    "wrong",
    "blue",
    "shirt",
    "bell",
    "crash",
)
TOPICS = ("refund", "fault", "status")


def sentence(row: int, length: int = 8) -> str:
    words = (ORDER_WORDS[(row * step + step) % len(ORDER_WORDS)] for step in range(1, length))
    return " ".join([f"order {row}", *words])


def write_table(path: Path, header: str, row: Callable[[int], str], rows: int = 60) -> Path:
    path.write_text("\n".join([header, *map(row, range(rows))]) + "\n", encoding="utf-8")
    return path


SIXTEEN_LABELS = np.array([0, 1] * 8)
SIXTEEN = [f"the film was {('good', 'awful')[i % 2]} {'and red ' * (i % 4)}" for i in range(16)]


def save_rows(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def task_sentence(row: int, word: str) -> str:
    return f"the film {row} was {word} {' '.join(WORDS[: row % 5])}"


def write_values(path: Path, low: float, high: float, count: int = 60) -> Path:
    """Write made-up reviews with a number each, which two words tell within a tenth, as CSV."""
    lines = ["text,label"]
    for row in range(count):
        word, share = (("good", 0.9), ("awful", 0.1))[row % 2]
        value = low + (high - low) * (share + 0.1 * (row % 5 - 2) / 2)
        filler = " ".join(WORDS[6 : 6 + row // 2 % 4])
        lines.append(f"the film {row} was {word} {filler},{value:.3f}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
