"""Micro-batches come together as the others expect them, and gradients survive a step that fails."""

import pytest
import torch
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.schedules.replicas import ALONE, COPIED
from shardwright.sharder.runtime.piping.batches import BatchForm, Division, OutputForm
from shardwright.sharder.runtime.piping.engine import SharedGradients, SharedParameter
from shardwright.sharder.runtime.piping.replicas import buckets


def test_results_are_joined_as_they_are_received():
    """In the memory layout of a new tensor, whatever the model's: a broadcast sends bytes, and no strides."""
    parts = [torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    (whole,) = OutputForm(parts[0], [0], 2).joined([[part] for part in parts])
    assert torch.equal(whole, torch.cat(parts))
    assert whole.stride() == torch.empty(4, 4, 3, 3).stride()


def test_a_step_that_fails_leaves_the_gradients_of_shared_parameters():
    """What was accumulated over earlier steps is there again."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = earlier = torch.full((2,), 3.0)
    shared = SharedGradients((), 0, nn.Linear(1, 1))
    shared.shared = [(0, weight, None)]

    def step():
        with shared.summed():
            weight.grad = torch.ones(2)
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        step()
    assert weight.grad is earlier


def test_ties_of_the_same_devices_have_one_group(monkeypatch):
    """A group of GPUs takes memory and time; every process makes all of them in the same order."""
    made = []
    monkeypatch.setattr(torch.distributed, "new_group", lambda ranks, **_: made.append(ranks) or tuple(ranks))
    ties = [SharedParameter(frozenset([name]), holders) for name, holders in (("weight", (0, 1)), ("bias", (0, 1)))]
    ties.append(SharedParameter(frozenset(["other"]), (1, 2)))
    shared = SharedGradients(ties, 0, nn.Linear(1, 1), ranks=[4, 5, 6])
    assert made == [[4, 5], [5, 6]]
    assert shared.groups == [(4, 5)]
    assert [(number, group) for number, _, group in shared.shared] == [(0, (4, 5)), (1, (4, 5))]


def test_replicas_have_equal_parts_of_any_batch_that_they_can_share():
    """Whole micro-batches of the plan's size if each gets as many, else other ones; each sample goes to one replica."""
    form = BatchForm.of((torch.zeros(8, 3), torch.zeros(5)), {}, 8, 4, 2)
    assert form.divided(8) == Division(4, 2)
    assert form.divided(24) == Division(12, 2)
    assert form.divided(6) == Division(2, 3)  # of three micro-batches of 2 one replica would have more
    rows = torch.arange(24).reshape(8, 3)
    parts = [form.part((rows, torch.ones(5)), Division(4, 2), replica) for replica in range(2)]
    assert torch.equal(torch.cat([part[0] for part in parts]), rows)
    assert all(part[1].shape == (5,) for part in parts)
    with pytest.raises(ShardwrightError, match="7 samples has no equal parts for 2 replicas"):
        form.divided(7)


def test_small_gradients_are_summed_together():
    """Up to so many bytes, each dtype for itself; a large one is alone, and none is left out."""
    small, large = COPIED // 4 // 4, ALONE // 4
    given = [torch.zeros(n, dtype=d) for n in (small, large, small, small, small, small) for d in (torch.float32,)]
    given.insert(3, torch.zeros(7, dtype=torch.bfloat16))
    groups = buckets(given)
    assert sorted(len(group) for group in groups) == [1, 1, 1, 4]
    assert {id(t) for group in groups for t in group} == {id(t) for t in given}
    assert all(len({t.dtype for t in group}) == 1 for group in groups)
    assert all(sum(t.nbytes for t in group) <= COPIED for group in groups)
