"""Other libraries kept quiet while a command runs."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from entropy_fast.errors import EntropyFastWarning

__all__ = ["quiet_libraries"]


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
        _no_bars(given_back)
        yield


def _errors_alone(name: str, given_back: contextlib.ExitStack) -> None:
    logger = logging.getLogger(name)
    given_back.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.ERROR)


def _no_bars(given_back: contextlib.ExitStack) -> None:
    """None of transformers, hub, datasets and others: all are tqdm's in the end, and not all ask their library's switch."""
    bar = importlib.import_module("tqdm").tqdm
    usual = bar.__init__

    def disabled(self: Any, *arguments: Any, **named: Any) -> None:
        usual(self, *arguments, **{**named, "disable": True})

    given_back.callback(setattr, bar, "__init__", usual)
    bar.__init__ = disabled
