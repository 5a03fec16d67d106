"""Which steps are measured: equal work a few times, and calls of one module with the weights that they share."""

import os

import pytest
import torch
from test_campaign import WIDTH, examined
from torch import nn

from shardwright.profiler import campaign
from shardwright.profiler.cache import Cache
from shardwright.profiler.measuring import held, selection
from shardwright.profiler.measuring.selection import Item, Loan, bytes_of_all, chosen, known_by, own_bytes
from shardwright.profiler.measuring.stand_ins import sendable
from shardwright.profiler.measuring.timed import timed_steps
from shardwright.profiler.trace import trace

WEIGHTS = 4 * (WIDTH + 1) * WIDTH


class Looped(nn.Module):
    """Layers of one form called in this order, the first of them on the model's input."""

    def __init__(self, *order):
        super().__init__()
        self.order = order
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(max(order) + 1))

    def forward(self, x):
        for index in self.order:
            x = self.layers[index](x)
        return x


def selected(*order, train=True):
    """The names of the layers that are measured, and all that has to do with it."""
    capture = trace(Looped(*order), (torch.randn(4, WIDTH),), train=train)
    items = {Item(1, step.name): step for step in timed_steps(capture, train=train, accumulate=False)}
    keys, loans = known_by(items, train=train, optimizer="adam")
    names = [item.step.removeprefix("layers.") for item in chosen(items, keys, loans, train=train)]
    return [name for name in names if name != "output"], items, keys, loans


def test_of_large_equal_steps_fewer_are_measured():
    """Their code, cold in the first of them, hardly counts."""
    few = selection._Few()
    large = [few.admits("large", selection.LARGE_BYTES) for _ in range(5)]
    middle = [few.admits("middle", selection.LARGE_BYTES - 1) for _ in range(5)]
    assert sum(large) == selection.MOST_ALIKE_LARGE < sum(middle) == selection.MOST_ALIKE


def test_who_calls_a_module_again_borrows_it_from_the_first():
    """For equal work: the model's input needs no gradient, so the first call of all is another work."""
    _, items, keys, loans = selected(0, 1, 1, 1, 2, 0, 0)
    size = WEIGHTS * (1 + selection.STATE_COPIES)
    lent = {"layers.1#2": Loan("layers.1", 3), "layers.1#3": Loan("layers.1", 3)}
    assert loans == lent | {"layers.0#3": Loan("layers.0#2", 2)}
    by = {name: keys[Item(1, name)] for name in ("layers.0", "layers.0#2", "layers.0#3", "layers.1", "layers.2")}
    assert by["layers.0#2"] == by["layers.0#3"] == f"{by['layers.2']} of 2 calls"
    assert by["layers.1"] == keys[Item(1, "layers.1#2")] == f"{by['layers.2']} of 3 calls"
    assert by["layers.0"] not in (by["layers.2"], by["layers.0#2"])
    step = items[Item(1, "layers.1#2")]
    assert own_bytes(step, train=True) == own_bytes(step, loans["layers.1#2"], train=True) + size
    apart = [own_bytes(each, loans.get(item.step), train=True) for item, each in items.items()]
    assert sum(apart) == bytes_of_all(items.values(), train=True) + size  # of layers.0, whose first call is apart


def test_functions_and_modules_without_parameters_lend_nothing():
    """There are no weights to be found warm."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *[nn.ReLU()] * 3)
    items = {Item(1, step.name): step for step in trace(model, (torch.randn(4, WIDTH),), train=True).steps if step.call}
    assert not known_by(items, train=True, optimizer="adam")[1]


@pytest.mark.parametrize(
    ("order", "measured"),
    [
        ([0, *[1, 2, 3] * 4], ["0", "1", "2", "3", "1#2", "1#3", "1#4"]),  # in turn
        ([0, *[1] * 5, *[2] * 5, *[3] * 5], ["0", "1", "1#2", "1#3", "1#4", "2", "3"]),  # one after another
        ([0, 1, 1], ["0", "1", "1#2"]),
    ],
)
def test_of_equal_modules_called_again_one_lends_its_weights(monkeypatch, order, measured):
    """All are measured as first calls, as often as equal steps are; of one the calls that follow, too."""
    monkeypatch.setattr(selection, "MOST_ALIKE_BYTES", 0)
    assert selected(*order)[0] == measured


def test_where_steps_are_large_none_borrows_from_one_that_is_not_there(monkeypatch):
    """Of three equal modules two are measured; calls of the third, in turn with them, would bring their own weights."""
    monkeypatch.setattr(selection, "MOST_ALIKE_BYTES", 0)
    monkeypatch.setattr(selection, "LARGE_BYTES", 4 * WEIGHTS)
    assert selected(0, *[1, 2, 3] * 5)[0] == ["0", "1", "2", "1#2", "1#3", "1#4"]


def test_of_many_calls_some_are_measured():
    """However small they are: each is sent by itself."""
    names, *_ = selected(0, *[1] * 40)
    assert len(names) == 2 + selection.MOST_AGAIN


def test_the_same_work_at_several_numbers_of_microbatches_is_measured_at_one():
    """Where inputs have no samples: at the others it would be measured without those that call the module again."""
    _, items, keys, loans = selected(0, 1, 1)
    later = {Item(count, item.step): step for count in (2, 4) for item, step in items.items()}
    known = {item: keys[Item(1, item.step)] for item in later}
    assert {item.microbatches for item in chosen(later, known, loans, train=True)} == {2}


def made_ready(monkeypatch):
    """Where the passes go that a campaign measures."""
    passes, making = [], held.passes_held

    def noted(on_refused):
        made = making(on_refused)
        passes.extend(made)
        return made

    monkeypatch.setattr(held, "passes_held", noted)
    return passes


def test_calls_of_one_module_share_its_weights(monkeypatch, tmp_path):
    """They are one module where they are measured, too, which is updated once; each call has its times."""
    passes = made_ready(monkeypatch)
    model = Looped(0, 2, 1, 1, 1, 1, 1)
    findings, _ = examined(monkeypatch, Cache(tmp_path), model, torch.randn(4, WIDTH))
    calls = ["layers.1", *(f"layers.1#{number}" for number in range(2, 6))]
    for count, steps in zip((1, 2), passes, strict=True):
        modules = {item.step: id(subject.function) for item, subject in steps.subjects.items()}
        assert len({modules[name] for name in calls}) == 1
        assert len({modules[name] for name in ("layers.0", "layers.1", "layers.2")}) == 3
        rows = [findings.timings["cpu:0", count, name] for name in calls]
        assert rows == [rows[0]] * 5
        assert rows[0] != findings.timings["cpu:0", count, "layers.2"]
    updated = [item.step for item, subject in passes[0].subjects.items() if subject.optimizer is not None]
    assert updated == ["layers.0", "layers.2", "layers.1"]
    (parameters,) = (group["params"] for group in passes[0].optimizer.param_groups)
    assert len({*map(id, parameters)}) == len(parameters) == 6


@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.parametrize("virtual", [False, True])
def test_weights_made_on_the_spot_are_shared_too(parted, virtual):
    """Of a model without values; also where backwards are timed in two parts."""
    with torch.device("meta" if virtual else "cpu"):
        model, x = Looped(0, 1, 1, 1), torch.randn(4, WIDTH)
    capture = trace(model, (x,), train=True)
    items = {Item(1, step.name): step for step in timed_steps(capture, train=True, accumulate=False)}
    keys, loans = known_by(items, train=True, optimizer="adam", parted=parted)
    campaign.prepare("cpu:0", 1)
    how = held.How(train=True, optimizer="adam", parted=parted)
    for number, item in enumerate(items):
        call, loan = items[item].call, loans.get(item.step)
        call = sendable(call if loan is None else held.borrowing(call))
        held.hold(item.step, {1: call}, {item: keys[item]}, how, loan, number == 0)
    (steps,) = held.passes_held(lambda item, error: pytest.fail(f"{item}: {error}"))
    functions = {item.step: subject.function for item, subject in steps.subjects.items()}
    assert functions["layers.1"] is functions["layers.1#2"] is functions["layers.1#3"]
    assert not any(parameter.is_meta for parameter in functions["layers.1"].parameters())
    steps.run(held.HostStopwatch())
    phases = steps.readings["device"].of_steps[Item(1, "layers.1#2")].keys()
    assert phases == {"forward", "recompute", "backward"} | ({"backward_input", "backward_weight"} if parted else set())
    assert "update" in steps.readings["device"].of_steps[Item(1, "layers.1")]


def test_the_calls_that_are_measured_stand_for_all(monkeypatch, tmp_path):
    """The first finds the weights cold; the last goes back first, and adds its gradient to none."""
    monkeypatch.setattr(selection, "MOST_ALIKE_BYTES", 0)
    passes = made_ready(monkeypatch)
    examined(monkeypatch, Cache(tmp_path), Looped(0, *[1, 2] * 20), torch.randn(4, WIDTH), counts=(1,))
    (steps,) = passes
    weights = {item.step: weight for item, weight in steps.weights.items() if item.step[:8] in ("layers.1", "layers.2")}
    assert weights == {"layers.1": 1 / 2, "layers.2": 1 / 2, "layers.1#2": 9, "layers.1#3": 9, "layers.1#4": 1}


def test_of_two_calls_each_counts_once(monkeypatch, tmp_path):
    """There is none between the first and the last."""
    passes = made_ready(monkeypatch)
    examined(monkeypatch, Cache(tmp_path), Looped(0, 1, 1, 2, 2), torch.randn(4, WIDTH), counts=(1,))
    weights = {item.step: weight for item, weight in passes[0].weights.items()}
    assert weights == {"layers.0": 1, "layers.1": 1 / 2, "layers.2": 1 / 2, "layers.1#2": 1, "output": 1}


def test_calls_for_which_there_is_no_room_are_known_by_the_first(monkeypatch, tmp_path):
    """They would have to bring weights of their own, cold ones."""
    monkeypatch.setattr(campaign, "_groups", lambda jobs, _, grouped=campaign._groups: grouped(jobs, 0))
    passes = made_ready(monkeypatch)
    findings, sent = examined(monkeypatch, Cache(tmp_path), Looped(0, 1, 1, 1), torch.randn(4, WIDTH), counts=(1,))
    assert [name for _, name in sent if name.startswith("layers")] == ["layers.0", "layers.1"]
    assert all(len(steps.subjects) == 1 for steps in passes)
    timings = [findings.timings["cpu:0", 1, name] for name in ("layers.1", "layers.1#2", "layers.1#3")]
    assert timings == [timings[0]] * 3


def test_a_call_for_which_there_is_no_memory_is_known_by_the_first(monkeypatch, tmp_path):
    """Its inputs are what does not fit: the module is tried once more with its first call alone."""
    subject = held._Held.subject

    def greedy(self, microbatches):
        if self.loan is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return subject(self, microbatches)

    monkeypatch.setattr(held._Held, "subject", greedy)
    findings, sent = examined(monkeypatch, Cache(tmp_path), Looped(0, 1, 1, 1, 2), torch.randn(4, WIDTH), counts=(1,))
    assert [name for _, name in sent].count("layers.1") == 2
    assert not findings.misfits
    assert {"layers.1", "layers.1#2", "layers.1#3", "layers.2"} <= {step for _, _, step in findings.timings}


def test_the_weights_of_a_module_are_sent_once(monkeypatch, tmp_path):
    """A call that borrows it comes with something in its place."""
    functions = {}
    hold = campaign.hold

    def noted(name, calls, *rest):
        functions[name] = {call.function for call in calls.values()}
        return hold(name, calls, *rest)

    monkeypatch.setattr(campaign, "hold", noted)
    model = Looped(0, 1, 1, 1)
    examined(monkeypatch, Cache(tmp_path), model, torch.randn(4, WIDTH))
    assert functions["layers.1"] == {model.layers[1]}
    assert functions["layers.1#2"] == functions["layers.1#3"] == {held.lent}


@pytest.mark.parametrize("first", [True, False])
def test_a_module_that_does_not_fit_is_refused_in_all_its_calls(monkeypatch, tmp_path, first):
    """Whether its first call fails or one that borrows it; it is tried once more alone, and all others are measured."""

    class Greedy(nn.Linear):
        left = 2

        def forward(self, x):
            if os.environ.get("SHARDWRIGHT_TEST_MEMORY") == "none":
                self.left -= 1
            if self.left == 0 or (first and self.left < 2):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return super().forward(x)

    model = Looped(0, 1, 1, 1, 2)
    model.layers[1] = Greedy(WIDTH, WIDTH)
    hold = campaign.hold

    def measuring(*args):
        os.environ["SHARDWRIGHT_TEST_MEMORY"] = "none"
        return hold(*args)

    monkeypatch.setattr(campaign, "hold", measuring)
    monkeypatch.setenv("SHARDWRIGHT_TEST_MEMORY", "enough")
    findings, sent = examined(monkeypatch, Cache(tmp_path), model, torch.randn(4, WIDTH), counts=(1,))
    assert [name for _, name in sent].count("layers.1") == 2
    assert [name for _, name in sent].count("layers.1#2") == 1
    refused = {misfit.node for misfit in findings.misfits}
    assert refused == ({"layers.1", "layers.1#2", "layers.1#3"} if first else set())
    assert {"layers.0", "layers.2"} <= {step for _, _, step in findings.timings}


def test_what_is_called_again_is_walked_through_once(monkeypatch, tmp_path):
    """What a large module leaves in the caches is still there at its next call, and so it is where that is measured."""
    walked = []
    monkeypatch.setattr(held._Eviction, "__init__", lambda _, elsewhere_bytes: walked.append(elsewhere_bytes))
    monkeypatch.setattr(held._Eviction, "__call__", lambda *_: None)
    monkeypatch.setattr(selection, "MOST_ALIKE_BYTES", 0)
    examined(monkeypatch, Cache(tmp_path), Looped(0, *[1] * 20), torch.randn(4, WIDTH), counts=(1,))
    _, items, _, loans = selected(0, *[1] * 20)
    beyond = [f"layers.1#{number}" for number in range(5, 21)]
    data = sum(own_bytes(items[Item(1, name)], loans[name], train=True) for name in beyond)
    inputs = sum(selection.input_bytes(each.call) for item, each in items.items() if item.step not in beyond)
    assert walked == [data - inputs]  # what is held counts its inputs once more
