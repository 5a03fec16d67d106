"""Captures at several numbers of micro-batches: where arithmetic of one form may be computed once, and where not."""

import re
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch import nn

from shardwright.profiler import capture
from shardwright.profiler.capture import captures_of
from shardwright.profiler.recall import _digest
from shardwright.profiler.trace import trace

WIDTH = 8
UNITS = ["layers.*"]
COUNTS = (1, 2, 4)


class Stack(nn.Module):
    """Layers, one after another."""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(3))

    def forward(self, x):
        """Every layer, and a sum around it."""
        for layer in self.layers:
            x = x + layer(x)
        return x


class ReadingWhole(Stack):
    """Reads a number back, but of the whole batch only."""

    def forward(self, x):
        """The stack; of a large batch, the numbers are looked at too."""
        x = super().forward(x)
        return x * 2 if len(x) > 4 and bool(x.isnan().any()) else x


class Reading(Stack):
    """Reads a number back from a mask, whatever the batch."""

    def forward(self, x):
        """The stack, masked where the mask has a hole."""
        mask = torch.ones(x.shape[1:2], dtype=torch.bool)
        return super().forward(x) if bool(mask.all()) else x


def linear():
    """A layer with two products of different forms."""
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


def attention():
    """A layer with dropout, attention and normalisation."""
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.1, batch_first=True)


def convolution():
    """A layer with batch statistics."""
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))


@pytest.fixture
def echoes(monkeypatch):
    """Sizes of the batches that were captured, and whether arithmetic of one form was computed once."""
    found = []

    def noted(model, args, kwargs=None, *, echoes=False, **options):
        found.append((len(args[0]), echoes))
        return trace(model, args, kwargs, echoes=echoes, **options)

    monkeypatch.setattr(capture, "trace", noted)
    return found


def captured(model, x, *, train=True):
    """The captures at each of :data:`COUNTS`."""
    captures, reason = captures_of(model, (x,), {}, COUNTS, devices=2, units=UNITS, train=train)
    assert not reason
    return captures


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"), [(linear, (8, WIDTH)), (attention, (8, 5, WIDTH)), (convolution, (8, 3, 6, 6))]
)
def test_a_short_capture_tells_what_a_full_one_does(make, shape, train, echoes):
    """Steps, operators, tensors, bytes and the graph are the same: they follow from shapes alone."""
    torch.manual_seed(0)
    model, x = Stack(make), torch.randn(shape)
    captures = captured(model, x, train=train)
    assert echoes == [(4, True), (8, True)]
    for count in COUNTS:
        whole = trace(model, (x[: len(x) // count].clone(),), train=train, units=captures[1].units)
        assert _digest(captures[count], train=train) == _digest(whole, train=train)


def test_arithmetic_of_equal_layers_is_computed_once():
    """Unchecked captures have the first layer's product for the others'; the checked one has each its own."""
    torch.manual_seed(0)
    model, x = Stack(lambda: nn.Linear(WIDTH, WIDTH)), torch.randn(8, WIDTH)
    captures = captured(model, x)

    def grown(count):
        calls = [step.call for step in captures[count].steps if step.kind == "unit"]
        inputs = [call.args[0] for call in calls]
        return [after - before for before, after in pairwise(inputs)]

    torch.testing.assert_close(*grown(1))
    torch.testing.assert_close(grown(1)[0], model.layers[0](x).detach())
    assert not torch.allclose(*grown(4))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Reading, [(4, False), (8, False)]),
        (ReadingWhole, [(4, True), (8, True), (8, False)]),
    ],
)
def test_numbers_that_are_read_back_are_real_ones(kind, expected, echoes):
    """Where the smallest capture reads numbers all others compute them, and so does a larger one that reads some."""
    torch.manual_seed(0)
    captures_of(kind(linear), (torch.randn(8, WIDTH),), {}, COUNTS, devices=2, units=UNITS, train=True, strict=False)
    assert echoes[: len(expected)] == expected


class Tabled(nn.Module):
    """A layer with a table that it makes once for a size of batch and keeps where no snapshot of the model finds it."""

    tables: ClassVar[dict[tuple[float, int], torch.Tensor]] = {}

    def __init__(self, factor):
        super().__init__()
        self.factor, self.linear = factor, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        key = (self.factor, len(x))
        if key not in self.tables:
            self.tables[key] = torch.full((len(x), 1), self.factor) @ torch.ones(1, WIDTH)
        return self.linear(x) * self.tables[key]


def test_tables_that_a_model_keeps_are_right(echoes):
    """What is not trained is computed for each layer, also where arithmetic of one form is computed once."""
    factors = iter([1.0, 2.0, 3.0])
    model, x = Stack(lambda: Tabled(next(factors))), torch.randn(8, WIDTH)
    captured(model, x)
    assert echoes == [(4, True), (8, True)]
    assert len(Tabled.tables) == 3 * len(COUNTS)
    assert all(bool((table == factor).all()) for (factor, _), table in Tabled.tables.items())


class Masked(Stack):
    """Skips a mask that has no holes, as most libraries do."""

    def forward(self, x, mask):
        """Every layer, of what the mask leaves."""
        for layer in self.layers:
            x = layer(x) if mask.all() else layer(x) * mask
        return x


def test_padding_in_some_samples_is_told_with_its_remedy():
    """A micro-batch without padding goes another way than the whole batch; padding in each sample is one path."""
    model, x = Masked(lambda: nn.Linear(WIDTH, WIDTH)), torch.randn(8, WIDTH)
    mask = torch.ones(8, WIDTH, dtype=torch.bool)
    mask[-1, -1] = False
    captures, why = captures_of(model, (x, mask), {}, COUNTS, devices=2, train=True, strict=False)
    assert list(captures) == [1]
    where = r"__bool__ at test_capture.py:\d+:\d+ gives "
    assert re.search(
        rf"another path at \d micro-batches: .*; {where}True for the first of them, and False for all", why
    )
    assert "such as a mask with padding in each of them or in none, or profile with --microbatches 1" in why
    mask[:, -1] = False
    assert [*captures_of(model, (x, mask), {}, COUNTS, devices=2, train=True, strict=False)[0]] == [*COUNTS]


def test_another_path_for_another_reason_is_told_without_it():
    """Where the number of samples decides, no mask would help."""

    class BySize(Stack):
        def forward(self, x):
            x = super().forward(x)
            return x * 2 if len(x) > 4 else x

    _, why = captures_of(
        BySize(lambda: nn.Linear(WIDTH, WIDTH)),
        (torch.randn(8, WIDTH),),
        {},
        COUNTS,
        devices=2,
        train=True,
        strict=False,
    )
    assert re.fullmatch(r"the forward takes another path at \d micro-batches: .* has mul\w*; profile with .*", why)
