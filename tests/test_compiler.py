"""PyTorch's compiler: not imported where nothing is compiled, and told to keep away where a forward brings it in."""

import textwrap

import pytest
import torch
from torch import nn

from shardwright.profiler.memory import MemoryCounter
from shardwright.profiler.recording.compiler import uncompiled
from shardwright.profiler.recording.operations import OperationRecorder

SCRIPT = """
    import sys
    import torch
    from torch import nn
    from shardwright.profiler.capture import captures_of
    from shardwright.profiler.memory import MemoryCounter

    compiled = []


    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward


    class Stack(nn.Module):
        compiles = False

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2))
            self.function = None

        def forward(self, x):
            if self.compiles and self.function is None:
                self.function = torch.compile(self.between, backend=backend)
            return self.layers[1]((self.function or self.between)(self.layers[0](x)))

        def between(self, x):
            return x.sin() + 1


    def steps(train):
        captures, why = captures_of(model, (torch.randn(4, 3, 8),), {}, [1, 2], devices=2, depth=1, train=train)
        assert not why
        return {count: [(s.name, s.type, s.operations) for s in c.steps] for count, c in captures.items()}


    torch.manual_seed(0)
    model = Stack()
    with MemoryCounter():
        torch.ones(2) + 1
    known = steps(True), steps(False)
    assert "torch._dynamo" not in sys.modules
    Stack.compiles = True
    found = steps(True)
    assert "torch._dynamo" in sys.modules
    assert compiled, "the first forward compiles"
    assert found == known[0]
    del compiled[:]
    assert steps(False) == known[1]
    assert not compiled
"""


def test_a_capture_does_not_import_the_compiler_and_does_without_it(run_cli):
    """What compiles within its first forward is captured as what was never compiled is; all else needs no compiler."""
    result = run_cli.python("-c", textwrap.dedent(SCRIPT), timeout=240)
    assert result.returncode == 0, result.stderr


def test_modes_run_alike_with_the_compiler_there():
    """Whether PyTorch keeps its compiler from looking into them or not."""
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    torch.compile(layer, backend="eager")  # which imports it
    operations = []
    with OperationRecorder(operations.append), MemoryCounter() as counter:
        layer(x)
    assert [operation.name for operation in operations if operation.flops] == ["aten.addmm.default"]
    assert counter.peak_bytes == 2 * 3 * 4


def test_an_error_is_passed_on():
    """And the function is not run again for it, where the compiler was there or was not brought in."""
    calls = []

    @uncompiled
    def fail():
        calls.append(1)
        raise ValueError("once")

    with pytest.raises(ValueError, match="once"):
        fail()
    assert calls == [1]
