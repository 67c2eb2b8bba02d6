"""Rows of two texts, and a tiny sentence encoder that reads them apart."""

import shutil
from pathlib import Path

from support.backbones import OLD, WORDS, save_pipeline

MEAN = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
FIRST = ["good film", "the plot was very bad but the cat sat on the red mat", "fine", "a cat"]
SECOND = ["the good film was fine and great", "bad", "poor", "the dog ran under the red hill"]


def sentence_encoder(directory: Path, backbone: Path) -> Path:
    """Copy a backbone to a new directory, as the encoder of a pipeline with mean pooling."""
    shutil.copytree(backbone, directory)
    return save_pipeline(directory, MEAN, ("Normalize",), OLD)


def write_pairs(path: Path, rows: int = 60, regression: bool = False) -> Path:
    """Write pairs that say the same or something else, as CSV with first, second and label."""
    lines = ["first,second,label"]
    for row in range(rows):
        words = [WORDS[(row * step + step) % len(WORDS)] for step in range(1, 4 + row % 4)]
        other = words[::-1] if row % 2 else [WORDS[(row + step) % len(WORDS)] for step in range(5)]
        label = f"{(row % 2) * 3 + row / 100:.2f}" if regression else ("other", "same")[row % 2]
        lines.append(f"{' '.join(words)} {row},{' '.join(other)},{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pair_options(path: Path) -> list[str]:
    """Return options for pairs that are cut into train, dev and test, however few they are."""
    columns = ("--text", "first", "--text-pair", "second", "--label", "label")
    return ["--train-file", str(path), *columns, "--k", "24", "--folds", "none"]
