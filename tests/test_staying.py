"""Function modes that stay on in a backward: it is PyTorch's, and what it computes anew is told to the mode."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from shardwright.profiler.recording.staying import StayingMode


class Nothing(StayingMode):
    """Counts what it is asked for and changes nothing."""

    seen = 0

    def call(self, func, args, kwargs):
        self.seen += func is torch.relu
        return func(*args, **kwargs)


BACKWARDS = {
    "backward": lambda x, y: [y.sum().backward(), x.grad][1:],
    "of a vector": lambda x, y: [y.backward(torch.arange(3.0)), x.grad][1:],
    "functions": lambda x, y: [torch.autograd.backward([y.sum(), y], [None, y.detach()]), x.grad][1:],
    "inputs": lambda x, y: [torch.autograd.backward(y.sum(), inputs=[x]), x.grad][1:],
    "one input": lambda x, y: [torch.autograd.backward(y.sum(), inputs=x), x.grad][1:],
    "grad": lambda x, y: torch.autograd.grad(y.sum(), x),
    "twice": lambda x, y: torch.autograd.grad(
        torch.autograd.grad(y.sum(), x, create_graph=True)[0].square().sum(), [x]
    ),
    "kept": lambda x, y: torch.autograd.grad(y.sum(), x, retain_graph=True) + torch.autograd.grad(y.sum(), (x,)),
    "unused": lambda x, y: torch.autograd.grad(y.sum(), [x, torch.ones(2, requires_grad=True)], allow_unused=True),
    "materialized": lambda x, y: torch.autograd.grad(
        y.sum(), [x, torch.ones(2, requires_grad=True)], materialize_grads=True
    ),
    "no number": lambda _, y: y.backward(),
    "no graph": lambda _, y: y.detach().sum().backward(),
    "complex": lambda _, y: torch.view_as_complex(y[:2]).backward(),
    "unused, refused": lambda _, y: torch.autograd.grad(y.sum(), [torch.ones(2, requires_grad=True)]),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_backward_under_such_a_mode_is_pytorch_s(name):
    """The same gradients, or an error of the same kind; and where something is computed anew, the mode is told."""

    def run(mode):
        x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
        with mode:
            try:
                found = BACKWARDS[name](x, checkpoint(lambda t: torch.relu(t) * t * t, x, use_reentrant=False))
            except RuntimeError as error:
                return type(error)
        return [None if t is None else t.detach() for t in found]

    mode = Nothing()
    plain, under = run(nullcontext()), run(mode)
    assert type(plain) is type(under)
    if isinstance(plain, list):
        torch.testing.assert_close(under, plain)
        assert mode.seen >= 2
    else:
        assert under is plain
