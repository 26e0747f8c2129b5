"""Other libraries kept quiet while a command runs."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator

from entropy_fast.errors import EntropyFastWarning

__all__ = ["quiet_libraries"]

BARS = ("huggingface_hub.utils.tqdm", "datasets.utils.tqdm")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the libraries' bars and info lines, and our own warnings, which the result repeats; all of it given back.

    To be entered before anything heavy is imported: some of it is said during the import.
    """
    with warnings.catch_warnings(), contextlib.ExitStack() as given_back:
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        # What it warns of, missing weights, is an error here.
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        warnings.simplefilter("ignore", EntropyFastWarning)
        _errors_alone("bitsandbytes", given_back)
        from transformers.utils import logging as of_transformers

        of_transformers.get_verbosity()  # which sets its logger up, if nothing has yet
        _errors_alone("transformers", given_back)
        bars = [importlib.import_module(name) for name in BARS if name.partition(".")[0] in sys.modules]
        for library in bars:
            if not library.are_progress_bars_disabled():
                given_back.callback(library.enable_progress_bars)
        if of_transformers.is_progress_bar_enabled():
            given_back.callback(of_transformers.enable_progress_bar)
        of_transformers.disable_progress_bar()
        for library in bars:
            library.disable_progress_bars()
        yield


def _errors_alone(name: str, given_back: contextlib.ExitStack) -> None:
    logger = logging.getLogger(name)
    given_back.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.ERROR)
