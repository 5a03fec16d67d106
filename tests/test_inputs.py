"""The model's inputs: batch size and micro-batches."""

import warnings

import pytest
import torch

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.inputs import (
    batch_size,
    copied_inputs,
    default_counts,
    input_specs,
    is_mask,
    microbatch,
)


def test_only_batched_tensors_are_divided():
    """Tensors with the batch in front are cut; a mask for all and plain values are not."""
    x, mask = torch.arange(8.0).reshape(8, 1), torch.ones(3, 3)
    (cut, whole), kwargs = microbatch((x, mask), {"ids": x.long(), "flag": True}, 4)
    assert cut.tolist() == [[0.0], [1.0]]
    assert whole is mask
    assert kwargs["ids"].shape == (2, 1)
    assert kwargs["flag"] is True


def test_a_micro_batch_holds_no_more_than_itself():
    """A micro-batch is a copy: sending it does not send the batch along."""
    (cut,), _ = microbatch((torch.zeros(8, 2),), {}, 4)
    assert cut.untyped_storage().nbytes() == 2 * 2 * 4


def test_a_batch_that_does_not_divide():
    """The numbers that would do are named."""
    with pytest.raises(ShardwrightError, match=r"a batch of 6 cannot be divided into 4 .* use one of 1, 2, 3, 6"):
        microbatch((torch.zeros(6, 1),), {}, 4)


def test_a_batch_size_needs_a_tensor():
    """Inputs without tensors have no batch."""
    with pytest.raises(ShardwrightError, match="no tensor with a batch dimension"):
        batch_size((3,), {"flag": True})


def test_default_counts_divide_the_batch():
    """Powers of two up to 8, where they divide."""
    assert [default_counts(n) for n in (16, 12, 7)] == [(1, 2, 4, 8), (1, 2, 4), (1,)]


def test_specs_name_nested_inputs():
    """Each tensor among the inputs is listed with where it stands."""
    specs = input_specs((torch.zeros(2, 3),), {"pairs": {"left": torch.zeros(2, dtype=torch.int64)}})
    assert [(s.name, str(s)) for s in specs] == [("[0]", "float32 2x3"), ("['pairs']['left']", "int64 2")]


def test_copied_inputs_are_apart_from_the_callers():
    """Tensors, lists and objects are copies; what requires a gradient is a leaf that still does."""
    leaf, log = torch.ones(2, requires_grad=True), []
    (copied, made, copied_log), kwargs = copied_inputs((leaf, leaf * 2, log), {"flag": True})
    assert copied.is_leaf
    assert copied.requires_grad
    assert made.is_leaf
    assert made.requires_grad
    with torch.no_grad():
        copied.zero_()
    copied_log.append(1)
    assert leaf.tolist() == [1, 1]
    assert log == []
    assert kwargs == {"flag": True}


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_nested_input_is_refused(layout):
    """A nested tensor has no shape; the message names the input and the remedy."""
    with warnings.catch_warnings(action="ignore"):
        ragged = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=layout)
    with pytest.raises(ShardwrightError, match=r"input \['x'\] is a nested tensor, .*; pad it"):
        batch_size((), {"x": ragged})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn])
def test_what_cannot_be_sorted_is_no_mask(dtype):
    """Rotary embeddings are complex numbers in some models; asking how many values differ would fail."""
    assert not is_mask(torch.zeros(64, 64).to(dtype))
    assert is_mask(torch.zeros(64, 64))
