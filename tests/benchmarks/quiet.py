"""What every benchmark asks of the libraries that it runs: silence."""

import logging
import os
import warnings

import transformers


def quieten() -> None:
    """Keep the libraries' talk out of the tables."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
