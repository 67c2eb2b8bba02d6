"""Two texts of a row that a sentence encoder reads apart: what a head reads of them, and when.

Which features were compared on frozen minilm, 100 train rows, on rows drawn from GLUE's train part
(mrpc, rte, stsb, qnli, qqp, mnli): these were ahead of both texts in one row on each of the six,
and of the vectors themselves beside them, which are too many numbers for 100 rows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from unipelt_cli.backbones.pretrained import Pretrained
from unipelt_cli.errors import BackboneError

TEXTS = 2


def features_of_pairs(pooled: Tensor) -> Tensor:
    """Return [|u-v|, u*v, cosine] (B, 2H+1) of unit vectors u and v, from (2B, H).

    `pooled` holds all first texts, then all second ones. Features as in Sentence-BERT's (Reimers
    and Gurevych 2019, arXiv 1908.10084), without u and v themselves.
    """
    first, second = functional.normalize(pooled, dim=-1).chunk(TEXTS)
    product = first * second
    return torch.cat([(first - second).abs(), product, product.sum(-1, keepdim=True)], dim=-1)


def width_of_pairs(hidden: int) -> int:
    """Return how many numbers `features_of_pairs` makes of vectors of `hidden` ones."""
    return 2 * hidden + 1


def choose_pairs(wanted: str, pretrained: Pretrained, pooling: str, *, has_pairs: bool) -> str:
    """Return "joint" or "apart"; `auto` is apart for pairs on an encoder whose texts are compared.

    That is one whose own files name the pooling in use: the cosine of another one was never
    trained. A choice of the user's stays as it is; it changes nothing where a row has one text.
    """
    if wanted != "auto":
        return wanted
    if not has_pairs:
        return "joint"
    try:
        reading = pretrained.sentence_reading
    except BackboneError:  # said where the pooling follows it
        return "joint"
    return "apart" if reading.compares and reading.pooling == pooling else "joint"


def notes_of_pairs(kind: str, apart: Sequence[bool]) -> Iterator[str]:
    """Say how the tasks' pairs are read, where that is not as one text."""
    if any(apart):
        yield (
            "the two texts of a pair are read each by itself, and compared, as a sentence encoder "
            "reads them: --set model.pairs=joint reads both as one"
        )
    elif kind == "apart":
        yield "model.pairs = 'apart' changes nothing here: a row has one text"
