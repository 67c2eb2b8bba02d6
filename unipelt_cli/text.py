"""Text made visible, short, or one line, for messages and pictures."""

from collections.abc import Mapping


def plain(text: str) -> str:
    """Make control characters visible, so that data cannot steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def drawable(text: str, keep: str = "") -> str:
    """Put a sign in the place of what has no picture; `keep` holds what stays all the same."""
    return "".join(c if c.isprintable() or c in keep else "?" for c in text)


def cut(text: str, most: int = 200) -> str:
    """Shorten a text to what a message can hold."""
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(value: object) -> str:
    """Write a value out for a message, but no more of it than one can hold."""
    return cut(repr(value))


def short(value: str) -> str:
    """Quote a value of the user's, cut to what an error message can hold."""
    return repr(cut(value, 60))


def first_line(error: BaseException, words: str | None = None) -> str:
    """Return the first line of what an error says, or its type's name where it says nothing."""
    words = str(error) if words is None else words
    return (words.strip().splitlines() or [type(error).__name__])[0][:200]


def reason(error: BaseException) -> str:
    """Return an error's words in one line; of the system's errors, without number and path."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else None
    return first_line(error, words)


def reason_with_type(error: BaseException) -> str:
    """Return an error's type and the first line of what it says."""
    name = type(error).__name__
    return f"{name}: {first_line(error)}" if str(error).strip() else name


def shown_score(name: str, positive: str | Mapping[str, str] | None) -> str:
    """Return what a score is called where it is read: F1 of two labels with the label it is of."""
    task, _, metric = name.rpartition(".")
    label = positive.get(task) if isinstance(positive, Mapping) else positive
    return f"{name} of {short(label)}" if metric == "f1" and label is not None else name


def rate(value: float) -> str:
    """Write a learning rate as papers do: 5e-4, 0.3."""
    digits, _, power = f"{value:e}".partition("e")
    return f"{value:g}" if value >= 0.1 else f"{float(digits):g}e{int(power)}"


def rates(ours: float | None, paper: float | None, optimizer: str | None) -> str:
    """Write our learning rate, and behind it the paper's, or with what else the paper trains.

    A method that takes no steps has none.
    """
    if ours is None:
        return "-"
    theirs = optimizer if paper is None else rate(paper)
    return f"{rate(ours)} ({theirs})" if theirs else rate(ours)
