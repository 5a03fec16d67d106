"""The recorder on numbers that are read back: what no graph can hold is named."""

import pytest
import torch
from recording import ROWS, WIDTH, Layers, faithful, marked, obstacles, repeatable, rows, with_mask
from torch import nn
from torch.nn import functional as F  # noqa: N812

from shardwright.errors import ShardwrightError

__all__ = ["repeatable"]

# Numbers that are read


class Reading(Layers):
    """Reads something of what the first layer gives, and uses it."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x, *rest):
        return self.layers[1](self.layers[0](x) * self.read(x, *rest))


def numpy_round_trip(x):
    return torch.from_numpy(x.detach().numpy() * 2)


READS = {
    "item": lambda x: x.sum().item(),
    "a branch": lambda x: 2 if x.sum() > 0 else 3,
    "and": lambda x: 2 if x.sum() > 0 and x.max() > 0 else 3,
    "int": lambda x: int(x.max()) + 2,
    "float": lambda x: float(x.max()),
    "tolist": lambda x: x[0].tolist()[0],
    "round": lambda x: range(8)[(x > 0).sum() % 8] + 1,
    "format": lambda x: len(f"{x.max():.3f}") + int(x.argmax().item()),
    "contained": lambda x: 2 if 0.5 in x else 3,
    "equal": lambda x: 2 if torch.equal(x[0], x[1]) else 3,
    "allclose": lambda x: 2 if torch.allclose(x[0], x[1]) else 3,
    "any": lambda x: 2 if (x > 100).any() else 3,
    "max of a list": lambda x: max(x[:, 0]).item(),
    "a comprehension": lambda x: sum(1 for row in x if row.sum() > 0) + 1,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy() * 2),
    "nan check": lambda x: x.nan_to_num() if torch.isnan(x).any() else x,
    "multinomial": lambda x: torch.multinomial(x.exp(), 1).tolist()[0][0] + 1,
}


@pytest.mark.parametrize("name", list(READS))
def test_a_number_read_from_the_inputs_is_an_obstacle(name):
    """What gives Python a number that follows from the inputs is named with file and line."""
    read = READS[name]
    found = obstacles(Reading(read))
    assert all("depends on the inputs' values" in text for text in found)
    assert found[0].startswith(f"test_recorder_reads.py:{read.__code__.co_firstlineno}:"), found


SHAPED = {
    "a mask": lambda x: x[x > 0].sum(),
    "nonzero": lambda x: (x > 0).nonzero().float().sum(),
    "as tuple": lambda x: torch.nonzero(x > 0, as_tuple=True)[0].float().sum(),
    "where": lambda x: torch.where(x > 0)[0].float().sum(),
    "masked_select": lambda x: x.masked_select(x > 0).sum(),
    "masked_select by name": lambda x: torch.masked_select(input=x, mask=x > 0).sum(),
    "unique": lambda x: x.round().unique().sum(),
    "rows by mask": lambda x: x[x[:, 0] > 0, 1:].sum(),
    "repeated": lambda x: x[0].repeat_interleave(x[0].abs().long()).sum(),
    "repeated by name": lambda x: torch.repeat_interleave(x[0], repeats=x[0].abs().long()).sum(),
    "repeated indices": lambda x: torch.repeat_interleave(x[0].abs().long()).float().sum(),
    "one_hot": lambda x: F.one_hot(x[0].abs().long()).sum(),
    "packed": lambda x: nn.utils.rnn.pack_padded_sequence(
        x.unsqueeze(2), x[:, 0].abs().long() + 1, batch_first=True, enforce_sorted=False
    ).data.sum(),
}


@pytest.mark.parametrize("name", list(SHAPED))
def test_a_shape_that_follows_from_the_inputs_is_an_obstacle(name):
    """A tensor whose size depends on numbers is named with file and line."""
    read = SHAPED[name]
    found = obstacles(Reading(read))
    assert found[0].startswith(f"test_recorder_reads.py:{read.__code__.co_firstlineno}:"), found
    assert "whose shape depends on the inputs' values" in found[0]


def test_an_assignment_by_mask_is_none():
    """Writing numbers where a mask is true changes no shape."""

    class Model(Layers):
        def forward(self, x):
            y = self.layers[0](x).clone()
            y[x > 0] = 0.0
            return self.layers[1](y + torch.where(x > 0, x, -x))

    faithful(Model())


def test_a_number_read_from_parameters_is_an_obstacle():
    """A scale that is read to Python would stay at its first value while it is trained."""

    class Model(Layers):
        def forward(self, x):
            return self.layers[1](self.layers[0](x) * self.layers[0].weight.norm().item())  # <--

    model = Model()
    (found,) = obstacles(model)
    assert found.startswith(marked(model))
    assert found.endswith("that depends on parameters")


FROM_SHAPES = {
    "a causal mask": lambda x: 2 if (torch.arange(len(x))[:, None] >= torch.arange(len(x))).all() else 3,
    "a length": lambda x: torch.tensor(x.shape[0]).item(),
    "ones like": lambda x: 2 if torch.ones_like(x).sum() > 3 else 3,
    "a constant": lambda _: int(torch.zeros(3).sum()) + 2,
    "nonzero": lambda x: (torch.arange(len(x)) > 1).nonzero().float().sum(),
    "rows by position": lambda x: x[torch.arange(len(x)) > 1].sum(),
    "selected": lambda x: x.masked_select(torch.eye(*x.shape) > 0).sum(),
    "repeated": lambda x: x.repeat_interleave(torch.arange(len(x)), 0).sum(),
    "repeated to a size": lambda x: x[0].repeat_interleave((x[0] * 0).long() + 1, output_size=WIDTH).sum(),
    "one-hot": lambda x: F.one_hot((x[0] > 0).long(), 2).sum() + F.one_hot((x[0] > 0).long(), num_classes=2).sum(),
    "a size": lambda x: x.numel() + x.dim() + x.stride(0) + len(x) + x.element_size(),
    "a dtype": lambda x: 2 if x.dtype == torch.float32 and x.is_floating_point() and not x.is_cuda else 3,
    "no position": lambda x: torch.linspace(0, 1, len(x)).tolist()[1],
}


@pytest.mark.parametrize("name", list(FROM_SHAPES))
def test_a_number_that_follows_from_shapes_is_no_obstacle(name):
    """What is the same for all inputs of these shapes may be read freely, and needs no guard."""
    assert faithful(Reading(FROM_SHAPES[name])).guards == []


# Guards


class Masked(Layers):
    """Skips the mask when it masks nothing, as many models do."""

    def forward(self, x, mask):
        y = self.layers[0](x)
        if not mask.all():  # <--
            y = y * mask[:, None]
        return self.layers[1](y)


def test_a_read_of_a_mask_becomes_a_guard():
    """A read of an integer input is checked in every replay: inputs that give another answer are refused with file and
    line.
    """
    ones = torch.ones(ROWS, dtype=torch.bool)
    model = Masked()
    capture = faithful(model, with_mask(ones))
    (guard,) = capture.guards
    assert guard.startswith(f"__bool__ at {marked(model)}")
    assert guard.endswith(" gives True")
    holes = ones.clone()
    holes[1] = False
    with pytest.raises(ShardwrightError, match=f"{marked(model)}.* for these inputs .* for the sample inputs"):
        capture.module()(rows(1), holes)


def test_a_guard_holds_for_other_inputs_that_give_the_same():
    """Captured with holes in the mask, other holes are fine and none at all is refused."""
    holes = torch.tensor([1, 1, 0, 1])
    capture = faithful(Masked(), lambda seed: ((rows(seed), holes.roll(seed)), {}))
    with pytest.raises(ShardwrightError, match="profile with inputs like these"):
        capture.module()(rows(1), torch.ones(ROWS, dtype=torch.long))


def test_guards_compare_lists_and_numbers():
    """Lengths that are read as a list, and a largest length, are held to what they were."""

    class Model(Layers):
        def forward(self, x, lengths):
            longest = int(lengths.max())
            parts = x.split(lengths.sort().values.tolist())
            return self.layers[1](self.layers[0](torch.stack([part.sum(0) for part in parts]) * longest))

    capture = faithful(Model(), lambda seed: ((rows(seed), torch.tensor([3, 1]).roll(seed)), {}))
    assert [guard.partition(" at ")[0] for guard in capture.guards] == ["__int__", "tolist"]
    assert [guard.rpartition(" gives ")[2] for guard in capture.guards] == ["3", "[1, 3]"]


def test_a_guard_that_comes_out_differently_is_an_obstacle():
    """A number that the second input does not give is named as one that follows from the inputs."""

    class Model(Layers):
        def forward(self, x, lengths):
            first = int(lengths[0])  # <--
            return self.layers[1](self.layers[0](x[:first]).sum(0))

    model = Model()
    (found,) = obstacles(model, with_mask(torch.tensor([3, 2, 4, 1])))
    assert found.startswith(marked(model))
    assert "depends on the inputs' values" in found


def test_a_guard_that_the_second_input_never_meets_is_an_obstacle():
    """A branch that leads to further reads differs in their number, and is named."""

    class Model(Layers):
        def forward(self, x, ids):
            y = self.layers[0](x)
            if ids[0] == 3 and ids.sum() == 10:
                y = y * 2
            return self.layers[1](y)

    assert obstacles(Model(), with_mask(torch.tensor([3, 2, 4, 1])))


def test_a_floating_number_from_a_mask_is_an_obstacle():
    """Only whole numbers can be held to: a share of masked positions is an obstacle."""

    class Model(Layers):
        def forward(self, x, mask):
            return self.layers[1](self.layers[0](x) * mask.float().mean().item())  # <--

    model = Model()
    (found,) = obstacles(model, with_mask(torch.ones(ROWS, dtype=torch.bool)))
    assert found.startswith(marked(model))
