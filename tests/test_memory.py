"""Memory counted by storage: cases reckoned by hand, the allocator's own events, and random programs."""

import copy
import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812
from torch.profiler import ProfilerActivity
from torch.utils.checkpoint import checkpoint

import shardwright as sw
from shardwright.profiler.capture import captures_of
from shardwright.profiler.memory import MemoryCounter, StepMemory, count_step, total_bytes
from shardwright.profiler.recording.unitgraph import Call, Context
from shardwright.profiler.records import count_steps

KB = 4_000  # 1,000 floats


def floats(count=1_000, **options):
    return torch.ones(count, **options)


def test_what_is_made_counts_until_it_dies():
    """Live bytes grow with each new storage and fall when the last reference goes; the peak stays."""
    with MemoryCounter() as counter:
        a = floats() + 1  # the ones die at once
        assert (counter.live_bytes, counter.peak_bytes) == (KB, 2 * KB)
        b = a * 2
        del a
        assert counter.live_bytes == KB
        b.add_(1)
        assert (counter.live_bytes, counter.peak_bytes) == (KB, 2 * KB)
    del b
    assert counter.live_bytes == 0


def test_views_are_free_and_keep_their_storage():
    """A view costs nothing; its storage lives as long as any view of it."""
    with MemoryCounter() as counter:
        row = floats().view(10, 100)[3]
        assert counter.live_bytes == KB
        del row
        assert counter.live_bytes == 0


def test_a_cycle_holds_its_storage_until_it_is_collected():
    """A tensor in a ring of Python objects is live until the collector breaks the ring."""
    gc.disable()
    try:
        with MemoryCounter() as counter:
            ring = [floats()]
            ring.append(ring)
            del ring
            assert counter.live_bytes == KB
            gc.collect()
            assert counter.live_bytes == 0
    finally:
        gc.enable()


def test_resizing_counts_the_new_size():
    """A storage that is resized counts as it is now."""
    with MemoryCounter() as counter:
        a = floats(10)
        a.resize_(1_000)
        assert counter.live_bytes == KB


def test_tensors_from_before_count_only_if_asked():
    """What was alive before is left out, and nothing is subtracted when it dies; or it counts once, when first seen."""
    for asked in (False, True):
        before = floats()
        with MemoryCounter(count_existing=asked) as counter:
            before.add_(1)
            before.view(10, 100).mul_(2)
            assert counter.live_bytes == (KB if asked else 0)
            del before
            assert counter.live_bytes == 0


def test_tensors_of_python_numbers_count():
    """What torch.tensor makes has been made under the counter, though not by an operation."""
    with MemoryCounter() as counter:
        numbers = torch.tensor([1.0, 2.0])
        assert counter.live_bytes == 8
        del numbers


def test_sparse_tensors_count_their_parts():
    """A sparse gradient is its indices and values."""
    table = nn.Embedding(1_000, 4, sparse=True)
    with MemoryCounter() as counter:
        table(torch.tensor([1, 2, 3])).sum().backward()
    assert counter.live_bytes == total_bytes([table.weight.grad]) == 3 * 8 + 3 * 4 * 4


def test_the_mark_begins_a_new_peak():
    """After a mark the peak is that of what follows."""
    with MemoryCounter() as counter:
        kept = floats()
        floats(5_000)
        counter.mark()
        assert counter.peak_bytes == KB
        floats(2_000)
        assert counter.peak_bytes == 3 * KB
        del kept


def test_sizes_are_rounded_as_an_allocator_does():
    """With a granularity each storage takes whole pieces of it."""
    with MemoryCounter(granularity=512) as counter:
        kept = [floats(1), floats(129)]
        assert counter.live_bytes == 512 + 1024
        del kept


def test_meta_and_fake_tensors_count_like_real_ones():
    """Sizes are those that real tensors would have."""
    with MemoryCounter() as counter:
        kept = floats(device="meta") * 2
        assert counter.live_bytes == KB
    with FakeTensorMode(), MemoryCounter() as counter:
        kept = floats() * 2
        assert (counter.live_bytes, counter.peak_bytes) == (KB, 2 * KB)
    with FakeTensorMode(), MemoryCounter() as counter:
        kept = torch.tensor([1.0, 2.0])
        assert (counter.live_bytes, counter.peak_bytes) == (8, 8)
    del kept


programs = st.lists(
    st.tuples(
        st.sampled_from(["make", "view", "copy", "change", "drop", "self"]), st.integers(0, 99), st.integers(1, 50)
    ),
    max_size=30,
)


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs)
def test_random_programs(program):
    """Whatever is made, viewed, changed and dropped, live bytes are those of the distinct storages within reach."""
    held, peak = [], 0
    counter = MemoryCounter()
    with counter:
        for what, which, size in program:
            if what == "make":
                held.append(torch.empty(size))
            elif held:
                chosen = held[which % len(held)]
                if what == "view":
                    held.append(chosen[: 1 + size // 2].view(-1))
                elif what == "copy":
                    held.append(chosen.clone())
                elif what == "change":
                    chosen.zero_()
                elif what == "drop":
                    del held[which % len(held)]
                else:
                    held[which % len(held)] = chosen.view(-1)
                del chosen
            live = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())
            peak = max(peak, live)
            assert counter.live_bytes == live
    assert counter.peak_bytes == peak


def allocated(function):
    """The most that the CPU allocator had given out at once while ``function`` ran, by its own events."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_the_allocator_agrees(calls):
    """A backward with gradients that are added up, and an optimizer's step, peak where the allocator's events do."""
    layer, x = nn.Linear(200, 200, bias=False), torch.randn(64, 200)
    optimizer = torch.optim.Adam(layer.parameters())

    def step():
        y = x
        for _ in range(calls):
            y = torch.relu(layer(y))
        y.sum().backward()
        del y
        optimizer.step()

    step()
    counter = MemoryCounter()
    with counter:
        step()
    assert counter.peak_bytes == pytest.approx(allocated(step), rel=0.01)


def memory(*sizes):
    """What a step takes, in the order of the record's fields."""
    return StepMemory(**dict(zip(StepMemory.model_fields, sizes, strict=False)))


def counted(function, *args, train=True, **options):
    args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    return count_step(Call(function, args, {}), train=train, **options)


def test_linear():
    """A linear layer saves its input only, and its backward makes the gradients of input, weight and bias."""
    found = counted(nn.Linear(100, 50), floats(1_000).view(10, 100))
    gradients = KB + 4 * 100 * 50 + 4 * 50
    assert found == memory(2_000, 0, 0, gradients, KB)


def test_relu_and_in_place():
    """ReLU saves its output; in place it makes none, and saves its input, which is not its own."""
    assert counted(nn.ReLU(), floats()) == memory(KB, KB, 0, KB, KB)
    assert counted(nn.ReLU(inplace=True), floats()) == memory(0, 0, 0, KB, KB)


def test_dropout_keeps_its_mask():
    """Dropout keeps the scaled mask, as large as its input."""
    assert counted(nn.Dropout(0.5), floats()) == memory(KB, KB, 0, KB, KB)


def test_convolution():
    """A convolution saves its input; its backward makes the gradients of input, weight and bias."""
    found = counted(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 16, 16))
    x, y, weights = 4 * 2 * 3 * 256, 4 * 2 * 8 * 14 * 14, 4 * (8 * 3 * 9 + 8)
    assert found == memory(y, 0, 0, x + weights, x)


def test_an_addition_hands_on_one_gradient():
    """Both inputs of a sum have the gradient of its output, and nothing new is made."""
    assert counted(torch.add, floats(), floats()) == memory(KB, 0, 0, 0, KB)


def test_workspace_of_a_chain():
    """What a step makes and lets go is its workspace: here the square beside the logarithm of it."""
    found = counted(lambda x: (x * x).log().exp().detach(), floats())
    assert (found.output_bytes, found.saved_bytes) == (KB, 0)
    assert found.forward_peak_bytes == KB * 2  # three live at once when the last is made, of which one is left


def test_attention_by_hand():
    """Scores and weights of a written-out attention: saved once each where autograd needs them."""
    q = torch.randn(2, 10, 25)

    def attention(q):
        return torch.softmax(q @ q.transpose(1, 2), -1) @ q

    found = counted(attention, q)
    scores, tokens = 4 * 2 * 10 * 10, 4 * 2 * 10 * 25
    assert (found.output_bytes, found.saved_bytes) == (tokens, scores)
    assert found.forward_peak_bytes == 0  # scores and weights, then weights and output: no more than is left


def test_checkpoint_saves_nothing_and_computes_again():
    """A checkpointed block keeps nothing, and its backward takes what its forward would have kept."""
    block = nn.Sequential(nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid())
    plain = counted(block, floats())
    again = counted(lambda x: checkpoint(block, x, use_reentrant=False), floats())
    assert (plain.saved_bytes, again.saved_bytes) == (3 * KB, 0)
    assert again.backward_peak_bytes >= plain.backward_peak_bytes + 3 * KB


def test_inference_saves_nothing():
    """Without training only the forward is run; what it leaves are outputs."""
    assert counted(nn.ReLU(), floats(), train=False) == memory(KB, 0, 0)


def test_a_step_without_gradient():
    """A step in a region of no_grad has no backward."""
    call = Call(torch.relu, (floats(requires_grad=True),), {}, Context(grad=False))
    assert count_step(call, train=True) == memory(KB, 0, 0)


def test_a_backward_in_two_parts_holds_what_came_in():
    """Of two layers the gradients of both outputs, of a function without parameters none; fakes count alike."""
    layers, x = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 25)), floats(1_000).view(10, 100)
    assert counted(layers, x, parted=True).deferred_bytes == 4 * 10 * (50 + 25)
    assert counted(nn.ReLU(), floats(), parted=True).deferred_bytes == 0
    assert counted(layers, x).deferred_bytes is None
    mode = FakeTensorMode()
    call = Call(fake(layers, mode), (mode.from_tensor(x.detach()).requires_grad_(),), {})
    assert count_step(call, train=True, parted=True) == counted(layers, x, parted=True)


def test_a_unit_that_is_called_again_adds_up_its_gradients():
    """Where a later call has made a gradient, each new one and the sum are there together."""
    layer, x = nn.Linear(100, 50, bias=False), floats(1_000).view(10, 100)
    once, again = counted(layer, x), counted(layer, x, called_again=True)
    weight, output = 4 * 100 * 50, 2_000
    assert once.backward_peak_bytes == KB + weight
    assert again.backward_peak_bytes == KB + 2 * weight - output  # the output's gradient is gone when the sum is made


def test_gradients_and_arguments_are_left_alone():
    """The parameters' own gradients are put back, hooks are gone, and the call's tensors have none."""
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    layer.weight.grad = kept = torch.randn(3, 3)
    before = x.clone()
    counted(layer, x, called_again=True)
    assert layer.weight.grad is kept
    assert layer.bias.grad is None
    assert not layer.weight._backward_hooks
    assert x.grad is None
    assert torch.equal(x, before)


def fake(module, mode):
    """A copy of ``module`` without numbers."""
    made = copy.deepcopy(module)
    for inner in made.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                inner._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
        for name, buffer in inner._buffers.items():
            inner._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
    return made


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(8, 4), (3, 8)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)), (2, 3, 8, 8)),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (4, 6, 16)),
    ],
)
def test_fake_tensors_take_what_real_ones_do(module, shape):
    """A step of a model without values takes the same bytes."""
    x = torch.randn(shape, requires_grad=True)
    mode = FakeTensorMode()
    without = count_step(Call(fake(module, mode), (mode.from_tensor(x),), {}), train=True)
    assert without == count_step(Call(module, (x,), {}), train=True)


def test_steps_of_a_model_are_counted_and_the_model_left_alone():
    """Every step that runs is counted; buffers, modes, gradients and the random state are as they were."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    x = torch.randn(4, 6)
    captures, _ = captures_of(model, (x,), {}, [1], devices=2, train=True)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.eval()
    found = count_steps(captures[1], train=True)
    assert set(found) == {step.name for step in captures[1].steps if step.call is not None}
    assert not model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_step_that_fails_alone_is_named():
    """A step that cannot be run again is refused by name, without a traceback."""

    class Once(nn.Module):
        def forward(self, x):
            if x.shape[0] == 5:
                raise ValueError("five")
            return x * 2

    model = nn.Sequential(nn.Linear(2, 2), Once())
    captures, _ = captures_of(model, (torch.randn(4, 2),), {}, [1], devices=2, train=True)
    step = captures[1].steps[2]
    step.call = Call(step.call.function, (torch.randn(5, 2),), {})
    with pytest.raises(
        sw.ShardwrightError, match="1 failed when it ran alone for its memory to be counted: ValueError"
    ):
        count_steps(captures[1], train=True)


class Branches(nn.Module):
    """A residual, a concatenation, a view, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
        self.head = nn.Sequential(nn.Linear(128, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x):
        x = x + F.relu(self.layers[0](x))
        a, b = self.layers[1](x), self.layers[1](torch.tanh(x))
        c = self.layers[2](a).view(-1, 2, 32).flatten(1)
        return self.head(torch.cat([c, b], dim=1))


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_predicted_peak_is_the_counted_one(captured_profile, microbatches):
    """The plan's peak of one device is within 3% of what a real step of the whole model takes."""
    model, x = Branches(), torch.randn(32, 64)
    profile = captured_profile(model, (x,), devices=["cpu:0"], microbatches=(1, microbatches), counted=True)
    predicted = sw.plan(profile, microbatches=microbatches).stages[0].memory_bytes
    optimizer = torch.optim.Adam(model.parameters())

    def step():
        for piece in x.chunk(microbatches):
            model(piece).square().mean().backward()
        optimizer.step()

    step()
    held = [*model.parameters(), *(p.grad for p in model.parameters()), x]
    held += [t for state in optimizer.state.values() for t in state.values()]
    counter = MemoryCounter()
    with counter:
        step()
    assert predicted == pytest.approx(total_bytes(held) + counter.peak_bytes, rel=0.03)


def test_gradients_taken_between_units_are_refused_where_they_are():
    """A force, the derivative of what units make, cannot be had of a step that runs alone: file and line, and why."""

    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            x = x.detach().requires_grad_()
            energy = self.layers[1](self.layers[0](x).tanh()).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    with pytest.raises(sw.ShardwrightError, match=r"test_memory\.py:\d+:\d+ takes gradients .* name it with --unit"):
        sw.profile(Force(), (torch.randn(2, 4),), devices=["cpu:0"], microbatches=[1])


def test_what_cannot_be_trained_is_said_without_the_step_that_found_it():
    """Outputs that are complex numbers have no loss of ours."""
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.cfloat) for _ in range(2)))
    with pytest.raises(sw.ShardwrightError, match=r"^the model returns no floating tensor"):
        sw.profile(model, (torch.randn(2, 4, dtype=torch.cfloat),), devices=["cpu:0"], microbatches=[1])
