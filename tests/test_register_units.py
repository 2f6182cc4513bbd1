"""register_units: what is said of a module type, what goes before what, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dist_agc
import helpers
from dist_agc.model import kinds


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """The registry is for the whole process."""
    before = dict(kinds._registered)
    yield
    kinds._registered.clear()
    kinds._registered.update(before)
    kinds._registrations += 1


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(3, 4, 5))
        self.bias = nn.Parameter(torch.rand(3, 4))


class Deeper(Stack):
    pass


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()


def dims(module: nn.Module, **options: Any) -> list[tuple[int, ...]]:
    return [row.dims for row in dist_agc.units(module, **options)]


def test_registered_units() -> None:
    assert dims(Stack()) == [(0,), (0,)]
    dist_agc.register_units(Stack, {"w": (0, -1), "bias": 1})
    row = dist_agc.units(nn.Sequential(Stack()))[0]
    assert (row.dims, row.count, row.why, row.guessed) == ((0, 2), 15, "Stack: registered", False)
    assert dims(Deeper()) == dims(nn.ModuleList([Stack()])) == [(0, 2), (1,)]
    dist_agc.register_units(Deeper, {"w": ()})
    assert dims(Deeper()) == [(), (1,)], "what is registered for the type itself goes before its bases"
    dist_agc.register_units(Stack, {"bias": ()})
    assert dims(Stack()) == [(0,), ()], "a second call replaces the first"
    assert dims(Stack(), units={"bias": 0, "w": (0, 1)}) == [(0, 1), (0,)], "units= goes before the registry"


def test_the_outermost_registered_module_goes_first() -> None:
    dist_agc.register_units(Stack, {"w": (0, 1)})
    assert dims(Around()) == [(0, 1), (0,)]
    dist_agc.register_units(Around, {"stack.w": (0, 2)})
    assert dims(nn.Sequential(Around())) == [(0, 2), (0,)]
    assert dims(Stack()) == [(0, 1), (0,)]


def test_the_registry_goes_before_the_table() -> None:
    class Mine(nn.Linear):
        pass

    dist_agc.register_units(Mine, {"weight": 1, "bias": 0})
    assert dims(Mine(3, 2)) == [(1,), (0,)]
    assert dims(nn.Linear(3, 2)) == [(0,), ()]
    weights = nn.utils.parametrizations.weight_norm(Mine(3, 2))
    rows = {row.name: row for row in dist_agc.units(weights)}
    assert rows["parametrizations.weight.original1"].dims == (1,)


def test_a_kept_plan_notices_a_registration() -> None:
    module = Stack()
    module.w.grad, module.bias.grad = torch.rand(3, 4, 5), torch.rand(3, 4)
    with pytest.warns(UserWarning, match="'w' "):
        assert helpers.agc(module).units == 3 + 3
    dist_agc.register_units(Stack, {"w": (0, 1)})
    assert helpers.agc(module).units == 12 + 3


@pytest.mark.parametrize(
    ("kind", "given", "error", "message"),
    [
        (Stack(), {"w": 0}, TypeError, "subclass"),
        ("Stack", {"w": 0}, TypeError, "subclass"),
        (int, {"w": 0}, TypeError, "subclass"),
        (Stack, {}, TypeError, "mapping"),
        (Stack, ["w"], TypeError, "mapping"),
        (Stack, {0: 0}, TypeError, "names of parameters of Stack"),
        (Stack, {"w": 0.5}, TypeError, "register_units.Stack.*'w'"),
        (Stack, {"w": "0"}, TypeError, "register_units.Stack.*'w'"),
        (Stack, {"w": (0, None)}, TypeError, "register_units.Stack.*'w'"),
    ],
)
def test_what_cannot_be_registered(kind: Any, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dist_agc.register_units(kind, given)
    assert dims(Stack()) == [(0,), (0,)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"v": 0}, r"register_units\(Stack\): Deeper has no parameter 'v'"),
        ({"inner.w": 0}, "no parameter 'inner.w'"),
        ({"w": 3}, r"register_units\(Stack\)\['w'\].*no such dim"),
        ({"w": (0, -4)}, "no such dim"),
        ({"bias": (0, 2)}, r"register_units\(Stack\)\['bias'\].*\(3, 4\)"),
    ],
)
def test_a_registration_is_checked_where_it_is_used(given: Any, message: str) -> None:
    dist_agc.register_units(Stack, given)
    for look in (dist_agc.units, dist_agc.Clipper):
        with pytest.raises(ValueError, match=message):
            look(Deeper())
