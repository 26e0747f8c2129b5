"""What a class offers of a layer above is made of the instance when it is asked for."""

from __future__ import annotations

import pytest

from entropy_fast import accessors
from entropy_fast.accessors import Accessor, accessed, register_accessor


def test_it_is_made_of_the_instance(monkeypatch):
    monkeypatch.setattr(accessors, "_HOME", {})
    register_accessor("thing.size", "builtins:len")

    class Thing(list):
        size = Accessor("thing.size", "How large it is.")

    assert Thing([1, 2]).size == 2
    assert isinstance(Thing.size, Accessor) and Thing.size.__doc__ == "How large it is."
    with pytest.raises(AttributeError):
        accessed("thing.size") and Thing([1]).weight
    with pytest.raises(KeyError):
        accessed("thing.weight")


def test_every_name_that_is_registered_is_there():
    for name in ("result.plot", "result.html", "ledger.plot"):
        assert callable(accessed(name))
