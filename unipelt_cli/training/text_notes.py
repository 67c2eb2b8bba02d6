"""What becomes of the train texts in the tokenizer's hands: cut, or not known to it."""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.data.prepared_directory import Prepared
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.training.loop import Training

SAMPLE_ROWS = 512  # whose pieces are counted
FULL_ROWS = 32  # of those as long as may be that are looked at whole
LONGEST_PIECE = 16  # characters: no more of a text is needed to see that it is cut
MOST_UNKNOWN = 0.2


def text_notes(
    experiment: Experiment, prepared: Sequence[Prepared], tuned: TunedModel, training: Training
) -> tuple[str, ...]:
    """Say in sentences how many train texts are cut, and whether many pieces are unknown.

    The rows are tokenized already; a few of the longest are once more, without a limit.
    """
    notes = []
    for dataset, course in zip(prepared, training.courses, strict=True):
        encoded = course.train[0]
        name = f"{dataset.task.name}: " if len(prepared) > 1 else ""
        columns = [dataset.splits["train"][column] for column in dataset.task.text]
        sentences = chain(
            _cut(columns, encoded, tuned, experiment.model.max_length),
            _unknown(encoded, tuned, experiment.model.backbone),
        )
        notes += [f"{name}{note}" for note in sentences]
    return tuple(notes)


def _cut(
    columns: Sequence[Sequence[str]], encoded: Encoded, tuned: TunedModel, limit: int
) -> Iterator[str]:
    """Say how many texts are longer than the limit: those that fill it, as far as a sample says."""
    what = "train rows"
    if encoded.texts > 1:  # each is cut by itself
        what, encoded = "texts of the train rows", encoded.each_text
        columns = [[text for column in columns for text in column]]
    full = np.flatnonzero(encoded.lengths >= limit).tolist()
    if not full:
        return
    looked_at = full[:FULL_ROWS]
    most = (limit + 1) * LONGEST_PIECE
    whole = tuned.tokenizer(
        *([column[row][:most] for row in looked_at] for column in columns),
        truncation=False,
        verbose=False,
    )
    longer = sum(len(ids) > limit for ids in whole["input_ids"])
    count = round(longer / len(looked_at) * len(full))
    if count:
        about = "about " if len(full) > len(looked_at) else ""
        yield (
            f"{about}{count} of {len(encoded)} {what} are longer than {limit} tokens and are "
            f"cut there; --set model.max_length=N reads more, up to 512"
        )


def _unknown(encoded: Encoded, tuned: TunedModel, backbone: str) -> Iterator[str]:
    """Say which share of the pieces are unknown, where it is large."""
    tokenizer = tuned.tokenizer
    unknown = tokenizer.unk_token_id
    frame = set(tokenizer.all_special_ids) - {unknown}
    sample = encoded.select(range(min(SAMPLE_ROWS, len(encoded))))
    ids = np.fromiter(chain.from_iterable(sample.ids), np.int64)
    pieces = ids[~np.isin(ids, sorted(frame))]
    if unknown is None or not len(pieces):
        return
    share = float(np.mean(pieces == unknown))
    if share > MOST_UNKNOWN:
        yield (
            f"{100 * share:.0f} % of the pieces of the train texts are unknown to the tokenizer of "
            f"{backbone}: a backbone of their language reads them, or a multilingual one, such as "
            f"--model xlm-roberta-base"
        )
