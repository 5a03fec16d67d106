"""Moving what is passed around: tensors come to one device, containers stay the caller's."""

import copy
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from shardwright.profiler.recording.structure import tensors_in
from shardwright.sharder.runtime.placing.moving import Mover, containers_in, moved, rewrite
from shardwright.sharder.runtime.placing.sim import on_host, sim_device

THERE = sim_device(0)
CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class State:
    hidden: object
    more: object = None


@dataclass(frozen=True)
class Frozen:
    hidden: object


CONTAINERS = {
    "list": lambda t: [t, 1],
    "deque": lambda t: deque([t, None]),
    "dict": lambda t: {"t": t},
    "OrderedDict": lambda t: OrderedDict(t=t),
    "defaultdict": lambda t: defaultdict(list, t=t),
    "UserDict": lambda t: UserDict(t=t),
    "namespace": lambda t: SimpleNamespace(t=t),
    "dataclass": State,
}


class Batch:
    """Moves itself, in place, as those of graph libraries do; a shallow copy has a store of its own."""

    def __init__(self, t):
        self.store = {"t": t, "count": 2}

    def __copy__(self):
        return Batch(self.store["t"])

    def to(self, device):
        self.store = {"t": self.store["t"].to(device), "count": 2}
        return self


VALUES = CONTAINERS | {
    "moves itself": Batch,
    "tuple": lambda t: (t, "x"),
    "namedtuple": lambda t: Pair(t, 2),
    "frozen": Frozen,
}


def inside(value):
    """The tensors in ``value``, which may be one of two classes that are not looked into elsewhere."""
    value = value.data if isinstance(value, UserDict) else list(value) if isinstance(value, deque) else value
    return [tensor for _, tensor in tensors_in(value)]


def devices(value):
    return {tensor.device.type for tensor in inside(value)}


@pytest.mark.parametrize("name", VALUES)
def test_tensors_come_to_the_device_whatever_holds_them(name):
    """What holds them is of the same class, and the given one is as it was."""
    given_ = VALUES[name](torch.ones(2))
    there = moved(given_, THERE)
    assert type(there) is type(given_)
    assert devices(there) == {"sim"}
    assert devices(given_) == {"cpu"}
    assert moved(there, THERE) is there


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_that_can_be_written_is_handed_on_itself(name):
    """So that what is written there is not lost; afterwards it holds what it held."""
    tensor = torch.ones(2)
    value = CONTAINERS[name](tensor)
    mover = Mover(THERE)
    assert mover(value) is value
    assert devices(value) == {"sim"}
    mover.put_back()
    (found,) = inside(value)
    assert found is tensor


def test_what_was_written_in_between_stays():
    """Slots with other tensors are left, also in a list that became shorter or longer."""
    a, b, c = torch.ones(1), torch.zeros(1), torch.full((1,), 2.0)
    values, state = [a, b], {"h": a, "b": b}
    mover = Mover(THERE)
    mover((values, state))
    values.pop(0)
    new = c.to(THERE)
    values.append(new)
    state["h"] = new
    mover.put_back()
    assert values[0] is b
    assert values[1] is new
    assert state["h"] is new
    assert state["b"] is b


def test_containers_that_are_kept_stay_moved():
    """Those whose `id` is given are not put back."""
    outer, inner = [torch.ones(1)], [torch.ones(1)]
    mover = Mover(THERE)
    mover((outer, inner))
    mover.put_back(kept=containers_in((inner, "x")))
    assert devices(outer) == {"cpu"}
    assert devices(inner) == {"sim"}


def test_a_tensor_moves_once():
    """What was one tensor is one there, as attention layers compare their inputs."""
    x = torch.ones(2)
    mover = Mover(THERE)
    first, second = mover(x), mover([x])[0]
    assert first is second


def test_a_container_that_holds_itself_is_moved():
    """The walk ends."""
    value = [torch.ones(1)]
    value.append(value)
    mover = Mover(THERE)
    assert mover(value) is value
    assert value[0].device == THERE
    assert containers_in(value) == {id(value)}


def test_what_is_no_container_is_left():
    """Modules, objects of the user's own and packed sizes stay; a device becomes the new one if it shall."""

    class Cache:
        def __init__(self):
            self.keys = torch.ones(1)

    cache, module = Cache(), nn.Linear(1, 1)
    packed = pack_sequence([torch.ones(2, 1), torch.ones(1, 1)])
    there = moved((cache, module, packed, CPU), THERE)
    assert there[0] is cache
    assert there[1] is module
    assert cache.keys.device == CPU
    assert there[2].data.device == THERE
    assert there[2].batch_sizes.device == CPU
    assert there[3] == CPU
    assert Mover(THERE, renamed=True)([CPU]) == [THERE]


def test_lengths_stay_on_the_cpu():
    """Whole numbers in one dimension do, where that is asked for, and nothing else."""
    lengths, ids = torch.tensor([3, 2]), torch.tensor([[3, 2]])
    mover = Mover(THERE, lengths_stay=True)
    assert mover(lengths).device == CPU
    assert mover(ids).device == THERE
    assert moved(lengths, THERE).device == THERE


LEAVES = st.sampled_from(["a", "b", "c"]) | st.integers() | st.none()
STRUCTURES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(State, inner, inner)
        | st.builds(Frozen, inner)
    ),
    max_leaves=8,
)


@given(STRUCTURES)
def test_putting_back_undoes_moving(structure):
    """For any structure: all tensors come there, and then all containers hold the very tensors that they held."""
    tensors = {name: torch.full((1,), float(ord(name))) for name in "abc"}

    def built(value):
        if isinstance(value, str):
            return tensors[value]
        if isinstance(value, (list, tuple)):
            return type(value)(map(built, value))
        if isinstance(value, dict):
            return {key: built(inner) for key, inner in value.items()}
        if isinstance(value, State):
            return State(built(value.hidden), built(value.more))
        return Frozen(built(value.hidden)) if isinstance(value, Frozen) else value

    value = built(structure)
    before = [(path, id(tensor)) for path, tensor in tensors_in(value)]
    mover = Mover(THERE)
    there = mover(value)
    assert devices(there) <= {"sim"}
    assert [path for path, _ in tensors_in(there)] == [path for path, _ in before]
    mover.put_back()
    assert [(path, id(tensor)) for path, tensor in tensors_in(value)] == before


def test_rewriting_is_counted_if_it_shall_be():
    """Values cross devices; PyTorch's count of changes rises only where asked for, and not for equal values."""
    tensor, changed = torch.zeros(2), torch.ones(2).to(THERE)
    version = tensor._version
    rewrite(tensor, changed, counted=False)
    assert tensor.tolist() == [1.0, 1.0]
    assert tensor._version == version
    rewrite(tensor, changed, counted=True)
    assert tensor._version == version
    rewrite(tensor, changed + 1, counted=True)
    assert tensor._version > version
    assert on_host(changed).tolist() == [1.0, 1.0]


def test_copies_do_not_share_what_moved():
    """A copy of what holds a tensor is written, never the given one, if copies are asked for."""
    value = {"x": [torch.ones(1)], "y": (torch.ones(1),)}
    twin = copy.copy(value)
    there = moved(value, THERE)
    assert there is not value
    assert value["x"] is twin["x"]
    assert devices(value) == {"cpu"}
