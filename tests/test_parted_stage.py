"""Pipelines whose backwards are in two parts: gradients are the unsharded model's, whatever crosses between stages."""

from contextlib import suppress

import pytest
import torch
from test_reports import text_of
from test_zoo import make
from torch import nn
from zoo import ZOO

import shardwright as sw
from shardwright.reports.run_report import RunReport


def in_two(profile, microbatches):
    """A zero-bubble plan of two stages, the last of the units that can be by themselves on the second."""
    units = list(dict.fromkeys(node.unit for node in profile.nodes if node.kind == "unit"))
    for last in reversed(units[1:]):
        with suppress(sw.ShardwrightError):  # tied to the first
            pins = {units[0]: "cpu:0", last: "cpu:1"}
            return sw.plan(profile, microbatches=microbatches, pins=pins, schedule="zero-bubble", time_limit_s=1.0)
    raise AssertionError("all units have to share a device")


def run_of(captured_profile, model, args, kwargs=None, microbatches=4):
    """A step of it, compared with the unsharded model's."""
    profile = captured_profile(model, args, kwargs or {}, microbatches=(1, microbatches), refined=True, parted=True)
    plan = in_two(profile, microbatches)
    assert (plan.schedule, len(plan.stages)) == ("zero-bubble", 2)
    return sw.run(model, plan, args, kwargs, steps=1, naive=False)


@pytest.mark.parametrize(
    "name",
    [
        "llama_tied",
        "convnext",
        pytest.param("gpt2", marks=pytest.mark.slow),
        pytest.param("whisper", marks=pytest.mark.slow),
        pytest.param("unet_2d_condition", marks=pytest.mark.slow),
        "hand_unet",
        "lstm_seq2seq",
        "multi_task",
        "soft_experts",
        "tied_autoencoder",
    ],
)
def test_gradients_of_the_zoo(captured_profile, name):
    """Tied weights, skips, several outputs, experts, recurrences; gradients laid out otherwise than they are sent."""
    model, args, kwargs = make(ZOO[name])
    run = run_of(captured_profile, model, args, kwargs, 2)
    assert run.schedule == "zero-bubble"
    assert run.equality.gradients <= run.equality.tolerance == 1e-5


class Scaled(nn.Linear):
    """A layer that changes the gradient of its output by a hook."""

    def forward(self, x):
        made = super().forward(x)
        if made.requires_grad:
            made.register_hook(lambda gradient: 2 * gradient)
        return made


class Awkward(nn.Module):
    """Between its stages pass a view, an input as it is, numbers without gradient, and what follows from weights alone;
    one layer is used twice in a row, and a gradient is changed by a hook."""

    def __init__(self):
        super().__init__()
        self.first, self.bias, self.twice, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.scaled = Scaled(8, 8)
        self.codes = nn.Embedding(5, 8)

    def forward(self, x, ids):
        wide = self.first(x).view(-1, 2, 4)
        offset = self.bias(torch.ones(1, 8, device=x.device))
        y = self.scaled(self.twice(torch.tanh(self.twice(wide.flatten(1)))) + offset + x)
        return self.last(y) + self.codes(ids), offset, y.view(-1, 4, 2)


def test_whatever_crosses_between_stages(captured_profile):
    """Gradients and several outputs are the model's, and the run's slots tell both parts of each backward."""
    torch.manual_seed(0)
    run = run_of(captured_profile, Awkward(), (torch.randn(8, 8), torch.randint(0, 5, (8,))))
    assert run.equality.gradients <= run.equality.tolerance == 1e-5
    assert run.accounts is not None
    weights = [slot for slot in run.accounts.measured if slot.what == "backward of weights"]
    assert sorted((slot.stage, slot.microbatch) for slot in weights) == [(s, m) for s in range(2) for m in range(4)]
    text = text_of(RunReport(run), 100)
    assert "zero-bubble, 4 micro-batches" in text
    for stage, account in enumerate(run.accounts.stages):
        own = [slot for slot in run.accounts.measured if slot.stage == stage and slot.what.startswith("backward")]
        assert account.measured.backward_s == pytest.approx(sum(slot.duration_s for slot in own))


def test_predicted_memory_is_held_against_what_a_step_took():
    """Profiled, planned and run: what waits between the parts of a backward is counted, a fifth as for 1F1B."""
    model, x = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]), torch.randn(256, 64)
    devices, pins = ["cpu:0", "cpu:1"], {"[0-2]": "cpu:0", "[3-5]": "cpu:1"}
    profile = sw.profile(model, (x,), devices=devices, microbatches=[1, 4], rounds=1, split_backward=True)
    plan = sw.plan(profile, microbatches=4, pins=pins, schedule="zero-bubble")
    run = sw.run(model, plan, (x,), steps=1, naive=False)
    for weighed, plain in zip(run.memory, sw.plan(profile, microbatches=4, pins=pins).stages, strict=True):
        assert weighed.measured_bytes == pytest.approx(weighed.predicted_bytes, rel=0.2), weighed
        assert weighed.predicted_bytes > plain.memory_bytes


def test_a_plan_that_contradicts_itself_is_refused(captured_profile):
    """What zero-bubble does not know, written into a plan by hand, is named in one line."""
    profile = captured_profile(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), (torch.randn(8, 4),), parted=True)
    plan = in_two(profile, 4).model_dump()
    plan["stages"] = list(plan["stages"])
    plan["stages"][1]["recompute"] = True
    with pytest.raises(ValueError, match="zero-bubble with stage 1 computed anew"):
        sw.Plan.model_validate(plan)
    plan["stages"][1] |= {"recompute": False, "backward_weight_s": None}
    with pytest.raises(ValueError, match="stage 1 lacks backward_input_s or backward_weight_s"):
        sw.Plan.model_validate(plan)
