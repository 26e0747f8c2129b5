"""What torch says about an operation without forward derivative, said so that a reader can act on it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from types import TracebackType

from torch import nn

from entropy_fast.errors import ForwardDerivativeError

__all__ = ["FORWARD_DERIVATIVE_FIX", "naming_the_operator"]

FORWARD_DERIVATIVE_FIX = (
    "use engine='one_pass' or 'two_pass', which need reverse mode only; or load the model with attn_implementation='sdpa' or "
    "'eager', experts_implementation='eager' for mixtures of experts, and torch's own operations in place of fused kernels."
)
_OPERATOR = re.compile(r"Trying to use forward AD with (\S+)")
_FUNCTION = "You must implement the jvp function"


@contextlib.contextmanager
def naming_the_operator(model: nn.Module) -> Iterator[None]:
    """Forwards of ``model`` in this context fail with an operation's and a module's name where there is no forward derivative.

    Raises:
        ForwardDerivativeError: one has none. Other errors pass as they are.
    """
    try:
        yield
    except RuntimeError as error:
        found = _OPERATOR.search(str(error))
        if found is None and _FUNCTION not in str(error):
            raise
        function, module = _where(error.__traceback__, model)
        operator = found.group(1) if found else f"the autograd function {function}"
        raise ForwardDerivativeError(
            f"engine 'jvp': {operator} has no forward derivative (it is used by {module}).", fix=FORWARD_DERIVATIVE_FIX
        ) from error


def _where(traceback: TracebackType | None, model: nn.Module) -> tuple[str, str]:
    """The class of the innermost autograd function, and the innermost module of the model, that were running."""
    function, module = "of unknown name", "the model"
    names = {id(m): name for name, m in model.named_modules()}
    while traceback is not None:
        values = traceback.tb_frame.f_locals
        own = values.get("self")
        if isinstance(own, nn.Module) and names.get(id(own)):
            module = f"'{names[id(own)]}', a {type(own).__name__}"
        if traceback.tb_frame.f_code.co_name == "apply" and isinstance(values.get("cls"), type):
            function = str(values["cls"].__name__)
        traceback = traceback.tb_next
    return function, module
