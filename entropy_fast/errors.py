"""Every exception this package raises on purpose.

Each message names the thing, what was found, what was expected, and what to do. Each type also derives from the built-in
exception a caller would catch without knowing this package (``ValueError`` for bad input, ``RuntimeError`` for a bad state).

Messages quote names and texts from files and models. What could act on a terminal or forge a line is escaped here, once.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "BundleError",
    "CheckpointingError",
    "ConfigError",
    "DistributedError",
    "EntropyFastError",
    "EntropyFastWarning",
    "ForwardDerivativeError",
    "GradContextError",
    "GradientCoverageError",
    "GraphDetachedError",
    "LearningRateError",
    "LedgerError",
    "MissingPackageError",
    "MissingTokenizerError",
    "ModelStateError",
    "NativeLibraryError",
    "OptimizerStateError",
    "OutputFileError",
    "ParameterRegistryError",
    "ProbeMemoryError",
    "ResultError",
    "ResumeError",
    "RolloutsError",
    "RolloutsFileError",
    "RunFolderError",
    "SamplingError",
    "escaped",
]


def escaped(text: str) -> str:
    """``text`` on one line, with every character that does not print written as its Python escape.

    That covers control characters (so line breaks and the beginnings of terminal sequences), bidirectional overrides and
    other invisible format characters, halves of surrogate pairs, and blanks other than the space. Escaping twice changes
    nothing.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class EntropyFastError(Exception):
    """Base of every error of this package.

    Args:
        problem: the thing, what was found and what was expected, in one or two sentences.
        fix: what the reader should do about it, in the imperative.

    Both are one paragraph and are kept `escaped`: the one line break of a message is the one between them, so that no text
    from a file can look like a line of ours.
    """

    def __init__(self, problem: str, *, fix: str) -> None:
        self.problem = escaped(problem)
        self.fix = escaped(fix)
        super().__init__(f"{self.problem}\n  What to do: {self.fix}")


class ConfigError(EntropyFastError, ValueError):
    """A probe option has a value that cannot be used."""


class RolloutsError(EntropyFastError, ValueError):
    """Rollouts in memory do not fit together (a field, its shape, its values)."""


class RolloutsFileError(EntropyFastError, ValueError):
    """A rollouts file cannot be read; the message gives the line or row and the reason."""


class MissingTokenizerError(RolloutsFileError):
    """A rollouts file gives tokens as texts, and no tokenizer was passed."""


class LearningRateError(EntropyFastError, ValueError):
    """The learning rate is zero, negative, not finite or not given."""


class OptimizerStateError(EntropyFastError, ValueError):
    """The optimizer (or ``optimizer.pt``) cannot give an Adam geometry for the model's trainable parameters."""


class OutputFileError(EntropyFastError, OSError):
    """A file cannot be written: no space, no permission, a directory that is gone."""


class RunFolderError(EntropyFastError, ValueError):
    """A run folder misses a file, or its ``run.json`` cannot be understood."""


class BundleError(RunFolderError):
    """A training step cannot be kept whole, or what was kept of one is no longer what was written."""


class ResultError(EntropyFastError, ValueError):
    """A result holds a number that is not finite, lacks what is asked of it, or its files on disk do not belong together."""


class ResumeError(EntropyFastError, ValueError):
    """A checkpoint of a probe is damaged, another process's, or of another probe than the one that is to go on from it."""


class LedgerError(EntropyFastError, ValueError):
    """A ledger's file is damaged or another writer's, or an entry does not fit those before it."""


class MissingPackageError(EntropyFastError, ImportError):
    """What was called needs a package that is not installed; the message names it."""


class SamplingError(EntropyFastError, ValueError):
    """Sampling was asked for something it cannot do."""


class GradContextError(EntropyFastError, RuntimeError):
    """Gradients are switched off where the probe needs them (inference mode, ``no_grad``)."""


class GraphDetachedError(EntropyFastError, RuntimeError):
    """Logits or sequence log-probs carry no autograd graph, or no parameter hangs on it."""


class ForwardDerivativeError(EntropyFastError, RuntimeError):
    """An operation of the model has no forward derivative, or has one that is not what its backward says."""


class GradientCoverageError(EntropyFastError, RuntimeError):
    """No parameter, or too small a share of the gradient, would be covered by the estimate."""


class ParameterRegistryError(EntropyFastError, RuntimeError):
    """A trainable parameter was added, removed or replaced after the registry was built."""


class CheckpointingError(EntropyFastError, RuntimeError):
    """Gradient checkpointing is set in a way the requested pass cannot use."""


class ModelStateError(EntropyFastError, RuntimeError):
    """The model is in a state in which probing it would change it or mean nothing."""


class DistributedError(EntropyFastError, RuntimeError):
    """Ranks of a process group do not work together: one failed, died, did not come, or holds other data than the rest.

    Args:
        problem, fix: see `EntropyFastError`.
        ranks: that it is about; empty where that is not known.
        lost: those of them that are gone, or did not come.
        agreed: whether all ranks that are left raise the same.
    """

    def __init__(
        self, problem: str, *, fix: str, ranks: tuple[int, ...] = (), lost: tuple[int, ...] = (), agreed: bool = False
    ) -> None:
        super().__init__(problem, fix=fix)
        self.ranks, self.lost, self.agreed = ranks, lost, agreed


class ProbeMemoryError(EntropyFastError, RuntimeError):
    """There is not enough memory for the smallest piece a probe can be cut into."""


class BackendUnavailableError(EntropyFastError, RuntimeError):
    """An op backend was requested by name but cannot run here; the message gives the reason."""


class NativeLibraryError(EntropyFastError, RuntimeError):
    """The compiled library refused a call, or does not belong to this version of the package."""


class EntropyFastWarning(UserWarning):
    """The result stands, but something about it should be known. Its message is `escaped` too."""

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))
