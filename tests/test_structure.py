"""Structures: the tensors in what a forward passes around, and copies with other tensors in their place."""

import copy
import dataclasses
import threading
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shardwright.profiler.recording.structure import (
    Hole,
    copied,
    filled,
    has_state,
    map_tensors,
    tensor_at,
    tensors_in,
    tensors_of,
)

Pair = namedtuple("Pair", ["left", "right"])  # the untyped kind, as models have it


@dataclasses.dataclass
class Record:
    """Fields, as many models return them."""

    hidden: Any
    extra: Any = None


@dataclasses.dataclass
class Output(OrderedDict):
    """A mapping that is a dataclass too, as transformers' ModelOutput: only what is not None is an item."""

    hidden: Any = None
    extra: Any = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))


class Slots:
    """Attributes without a ``__dict__``."""

    __slots__ = ("left", "right")

    def __init__(self, left, right):
        self.left, self.right = left, right


class MoreSlots(Slots):
    """Slots of its own beside the inherited ones."""

    __slots__ = ("middle",)

    def __init__(self, left, middle, right):
        super().__init__(left, right)
        self.middle = middle


class Plain:
    """An object with attributes."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def numbered(count):
    """Tensors that are told apart by their one number."""
    return [torch.tensor([float(i)]) for i in range(count)]


def numbers(value):
    return [tensor.item() for _, tensor in tensors_in(value)]


a, b, c, d = numbered(4)

STRUCTURES = {
    "a tensor": (a, [""]),
    "a tuple in a list": ([a, (b, 3, c)], ["[0]", "[1][0]", "[1][2]"]),
    "a dict in its own order": ({"z": a, 7: b, ("x", 1): c}, ["['z']", "[7]", "[('x', 1)]"]),
    "a namedtuple": (Pair(a, {"k": b}), ["[0]", "[1]['k']"]),
    "a dataclass": (Record(a, [None, b]), [".hidden", ".extra[1]"]),
    "a ModelOutput": (Output(a, (b, c)), ["['hidden']", "['extra'][0]", "['extra'][1]"]),
    "slots": (Slots(a, b), [".left", ".right"]),
    "inherited slots": (MoreSlots(a, b, c), [".middle", ".left", ".right"]),
    "an object": (Plain(one=a, two=Plain(three=b)), [".one", ".two.three"]),
    "a slice": (slice(a, None, b), [".start", ".step"]),
    "the same twice": ([a, {"again": a}], ["[0]", "[1]['again']"]),
    "nothing": ({"text": "abc", "numbers": (1, 2.0, None, torch.float32), "set": {1, 2}}, []),
}


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_each_tensor_is_told_with_its_path(name):
    """Tensors come in the order in which they are written, and each path leads to its tensor."""
    value, paths = STRUCTURES[name]
    found = tensors_in(value)
    assert [path for path, _ in found] == paths
    for index, (path, tensor) in enumerate(found):
        assert eval(f"value{path}") is tensor
        assert tensor_at(value, index) is tensor


def test_modules_and_functions_are_not_looked_into():
    """A module's parameters are not among the tensors of a structure that holds it, nor what a function closes over."""
    linear = nn.Linear(2, 2)
    assert tensors_in({"module": linear, "function": lambda: linear.weight, "method": linear.forward}) == []


def test_cycles_end():
    """Objects that refer to each other are visited once on the way down."""
    parent, child = Plain(state=a), Plain(state=b)
    parent.child, child.parent = child, parent
    assert tensors_in(parent) == [(".state", a), (".child.state", b)]
    ring = [c]
    ring.append(ring)
    assert tensors_in(ring) == [("[0]", c)]


def test_depth_counts_objects_only():
    """Six objects inside one another are looked into; lists and dicts may nest as deep as they like."""
    nested, deep = a, a
    for _ in range(6):
        nested = Plain(inner=nested)
    assert numbers(nested) == [0.0]
    assert numbers(Plain(inner=nested)) == []
    for _ in range(50):
        deep = [{"inner": deep}]
    assert numbers(deep) == [0.0]


def test_a_copy_is_apart_from_the_original():
    """What is changed in a copy stays in it, and the tensors are those that were given."""
    original = {"cache": Plain(keys=[a], seen=0), "record": Record(b)}
    made = copied(original, lambda t: t + 10)
    made["cache"].keys.append(c)
    made["cache"].seen = 1
    assert numbers(original) == [0.0, 1.0]
    assert original["cache"].seen == 0
    assert numbers(made) == [10.0, 2.0, 11.0]


def test_a_cycle_is_copied_as_a_cycle():
    """An object that refers to itself has a copy that refers to the copy."""
    node = Plain(state=a)
    node.me = node
    made = copied(node, lambda t: t + 10)
    assert made.me is made
    assert made.state.item() == 10
    assert filled(copied(node, lambda _: Hole(0)), [b]).me.state is b


def test_shared_parts_stay_shared_in_a_copy():
    """Two paths to one object or tensor lead to one copy."""
    shared = Plain(state=a)
    made = copied({"one": shared, "two": shared, "tensor": a}, lambda t: t + 10)
    assert made["one"] is made["two"]
    assert made["one"].state is made["tensor"]


def test_tensors_inside_autograd_are_replaced():
    """Results of operations, which cannot be deep-copied, are no hindrance."""
    weight = torch.ones(1, requires_grad=True)
    made = copied(Record(weight * 2), lambda t: t.detach())
    assert made.hidden.item() == 2
    assert not made.hidden.requires_grad


@pytest.mark.parametrize(
    "thing", [threading.Lock(), (i for i in ()), threading, open], ids=["lock", "generator", "module", "function"]
)
def test_what_cannot_be_copied_is_shared(thing):
    """A lock or a generator is the same in the copy, but the tensors beside it are replaced all the same."""
    original = Plain(state=a, inner=Plain(thing=thing, keys=[b]))
    made = copied(original, lambda t: t + 10)
    assert made.inner.thing is thing
    assert numbers(made) == [10.0, 11.0]
    assert made.inner.keys is not original.inner.keys
    template = copied(original, holes_for(original))
    assert numbers(filled(template, [c, d])) == [2.0, 3.0]
    assert filled(template, [c, d]).inner.thing is thing


def test_a_lock_in_a_cycle_is_all_that_is_shared():
    """Objects that refer to each other are copied although one of them holds a lock."""
    parent, child = Plain(state=a), Plain(state=b)
    parent.child, parent.lock, child.parent = child, threading.Lock(), parent
    made = copied(parent, lambda t: t + 10)
    assert made.child.parent is made
    assert made.lock is parent.lock
    assert numbers(made) == [10.0, 11.0]


def test_what_refuses_to_be_copied_is_shared_whole():
    """An object with a reason not to be copied is passed on as it is."""

    class Singleton:
        def __init__(self):
            self.keys = [1]

        def __deepcopy__(self, memo):
            raise TypeError("there is one of me")

    only = Singleton()
    made = copied({"only": only, "list": [a]}, lambda t: t + 10)
    assert made["only"] is only
    assert made["list"][0].item() == 10


def test_filling_uses_a_template_again_and_again():
    """Every filling is an object of its own; the template keeps its holes."""
    template = copied(Plain(keys=[a]), lambda _: Hole(0))
    one, two = filled(template, [b]), filled(template, [c])
    one.keys.append(d)
    assert numbers(one) == [1.0, 3.0]
    assert numbers(two) == [2.0]
    assert template.keys == [Hole(0)]


def test_a_hole_without_a_tensor_stays():
    """Filling with fewer tensors leaves the others' places."""
    assert filled([Hole(0), Hole(1)], [a]) == [a, Hole(1)]


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        *[(v, True) for v in ([], {}, {1}, Plain(x=1), Record(1), Slots(1, 2), Output(1))],
        *[(v, False) for v in (a, 1, "x", None, nn.Linear(1, 1), len, torch.float32, range(3), Plain())],
    ],
    ids=lambda value: str(value).partition(" object at ")[0].partition(".")[2] or str(value),
)
def test_state_is_what_a_call_could_change(value, answer):
    """Collections and objects with attributes have state; numbers, tensors, modules and functions have none."""
    assert has_state(value) is answer


# Laws

leaves = st.one_of(
    st.integers(0, 99).map(lambda n: torch.full((1,), float(n))), st.integers(), st.none(), st.text(max_size=3)
)
structures = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(0, 9), st.text(max_size=2)), inner, max_size=3),
        st.tuples(inner, inner).map(lambda two: Pair(*two)),
        st.tuples(inner, inner).map(lambda two: Record(*two)),
        st.tuples(inner, inner).map(lambda two: Output(*two)),
        st.tuples(inner, inner).map(lambda two: Slots(*two)),
        st.tuples(inner, inner).map(lambda two: Plain(one=two[0], two=two[1])),
        inner.map(lambda one: [one, one]),
    ),
    max_leaves=8,
)
laws = settings(max_examples=100, deadline=None, derandomize=True)


def holes_for(value):
    """A ``replace`` that puts a hole for each different tensor, and remembers which."""
    order = list(dict.fromkeys(id(tensor) for _, tensor in tensors_in(value)))
    return lambda tensor: Hole(order.index(id(tensor)))


def distinct(value):
    return list({id(tensor): tensor for _, tensor in tensors_in(value)}.values())


def same(one, other):
    """Whether two structures are of the same classes and hold the same values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    names = one.__slots__ if isinstance(one, Slots) else getattr(one, "__dict__", None)
    if names is not None:
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    return one == other


@laws
@given(value=structures)
def test_holes_filled_give_the_value_back(value):
    """Filling the holes of a copy with the tensors that were there gives an equal value, with those very tensors."""
    made = filled(copied(value, holes_for(value)), distinct(value))
    assert same(made, value)
    assert [id(t) for _, t in tensors_in(made)] == [id(t) for _, t in tensors_in(value)]


@laws
@given(value=structures)
def test_paths_lead_to_their_tensors(value):
    """Every path, written after the value, is the tensor."""
    for index, (path, tensor) in enumerate(tensors_in(value)):
        assert eval(f"value{path}") is tensor
        assert tensor_at(value, index) is tensor


@laws
@given(value=structures)
def test_mapping_keeps_order_and_form(value):
    """A mapped structure has the mapped tensors at the same paths, and the original is as it was."""
    before = copy.deepcopy(value)
    made = map_tensors(lambda t: t + 1, value)
    assert same(value, before)
    assert [path for path, _ in tensors_in(made)] == [path for path, _ in tensors_in(value)]
    assert numbers(made) == [number + 1 for number in numbers(value)]
    assert same(map_tensors(lambda t: t - 1, made), value)


LEAVES = st.one_of(st.none(), st.integers(), st.text(max_size=2), st.builds(torch.zeros, st.integers(0, 2)))
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.integers(), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
        st.builds(Pair, inner, inner),
        st.builds(Record, inner, inner),
        st.builds(Slots, inner, inner),
        st.builds(slice, inner, inner),
    ),
    max_leaves=12,
)


@given(NESTED, st.booleans())
def test_tensors_without_their_paths_are_those_with_them(value, around):
    """The quick walk finds what the other finds, in its order, also in what holds itself."""
    if around:
        value = [value, torch.ones(1), nn.Parameter(torch.ones(1))]
        value += [value, {"self": value}, Record(value)]
    assert list(map(id, tensors_of(value))) == [id(tensor) for _, tensor in tensors_in(value)]
