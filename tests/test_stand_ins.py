"""Values made on the spot: what is made has the form of what is missing, and can be computed with."""

import pickle

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import shardwright as sw
from shardwright.profiler.measuring.stand_ins import filled, sendable
from shardwright.profiler.recording.structure import tensors_in
from shardwright.profiler.recording.unitgraph import Call


def without_values():
    """A call of a block without values, on tensors without values."""
    with sw.empty_weights():
        block = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
        block[2].weight = nn.Parameter(block[2].weight.detach(), requires_grad=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, 8).T.requires_grad_()
        mask, index = torch.empty(8, dtype=torch.bool), torch.empty(8, 2, dtype=torch.long)
    return Call(block, (x,), {"mask": mask, "index": index})


def test_a_call_without_values_can_be_sent():
    """As shapes alone: another process knows nothing of this one's fake tensors."""
    call = sendable(without_values())
    sent = pickle.loads(pickle.dumps((call.args, call.kwargs)))
    assert all(tensor.is_meta for _, tensor in tensors_in(sent))


def test_whole_numbers_of_the_users_inputs_are_sent_along():
    """Indices spread over a table cost more than zeros; what has another form, or is no whole number, is made."""
    index, other, x = torch.randint(9, (8, 2)), torch.randint(9, (3, 2)), torch.randn(8, 4)
    call = sendable(without_values(), [x, other, index])
    assert call.kwargs["index"] is index
    assert call.args[0].is_meta


def test_what_is_made_has_its_form():
    """Shape, strides, dtype and whether it is trained; a scale is 1 and an index 0."""
    call = filled(sendable(without_values()))
    x = call.args[0]
    assert (x.shape, x.stride(), x.requires_grad) == ((8, 4), (1, 8), True)
    assert call.kwargs["mask"].all()
    assert not call.kwargs["index"].any()
    block = call.function
    assert block[1].running_var.eq(1).all()
    assert [p.requires_grad for p in block.parameters()] == [True, True, True, True, False, True]
    assert block(x).isfinite().all()


def test_a_shared_weight_stays_one():
    """Whether its users are modules of one unit or calls at several micro-batches."""
    with sw.empty_weights():
        block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        block[1].weight = block[0].weight
    filled(Call(block, (), {}))
    first = block[0].weight
    filled(Call(block, (), {}))
    assert block[1].weight is block[0].weight is first


def test_values_that_are_there_are_left():
    """A call that lacks nothing is the same call."""
    call = Call(nn.Linear(2, 2), (torch.ones(1, 2),), {})
    assert filled(call) is call
    assert sendable(call).args[0] is call.args[0]


def test_what_was_expanded_has_one_number_for_many_places():
    """As a class token that is handed to every sample; small types, which cannot draw, are made too."""
    token, small = torch.empty(1, 4).expand(8, 4), torch.empty(3, 3, dtype=torch.float8_e4m3fn)
    with sw.empty_weights():
        block = nn.Module()
        block.small = nn.Parameter(small.to("meta"), requires_grad=False)
    made = filled(Call(block, (token.to("meta").as_strided((8, 4), (0, 1)),), {}))
    assert made.args[0].stride() == (0, 1)
    assert made.args[0][0].equal(made.args[0][7])
    assert made.function.small.dtype == torch.float8_e4m3fn
