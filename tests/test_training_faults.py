"""What goes wrong on one rank of a training is told on all, in one line, and ends them."""

import functools
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from training import Chain, Language, alone, made_pipe, on_ranks, planned, unsharded, workers

import shardwright as sw

__all__ = ["alone", "workers"]  # fixtures


@pytest.mark.usefixtures("alone")
def test_a_plain_process_is_told_how_to_start(captured_profile):
    """More stages than processes: the line to start the script with, before anything is captured."""
    with pytest.raises(sw.ShardwrightError, match=r"2 stages, and this is one process: .*torchrun --nproc-per-node 2"):
        made_pipe(Chain, planned(captured_profile, Chain, 2))


def told(function, *args):
    """In a rank: the error of ``function``, or what it returns."""
    try:
        return function(*args)
    except sw.ShardwrightError as error:
        return str(error)


def refused_once_made(kind, plan, options, size):
    """In a rank: make a pipeline and take a step with a batch that may be another one on every rank."""
    pipe = made_pipe(kind, plan, **options)
    args, kwargs, target = kind.batch(int(os.environ["RANK"]) if size == "apart" else 0)
    return float(pipe.step(*args, target=target, **kwargs))


def test_the_number_of_processes_is_that_of_the_stages(workers, captured_profile):
    """One process too many, or one too few: both numbers, on every rank."""
    plan = planned(captured_profile, Chain, 2)
    for line in on_ranks(workers, 3, told, made_pipe, Chain, plan):
        assert line.startswith("the plan has 2 stages (cpu:0, cpu:1), and there are 3 processes")
        assert "torchrun --nproc-per-node 2" in line


def test_ranks_with_other_batches_are_told(workers, captured_profile):
    """A sampler that is seeded apart would train on inputs of one batch and targets of another."""
    plan = planned(captured_profile, Chain, 2)
    for line in on_ranks(workers, 2, told, refused_once_made, Chain, plan, {}, "apart"):
        assert line.startswith("rank 1 has a batch other than rank 0's; give every rank the same inputs and target")


def raising(_output, _target):
    raise ValueError("no luck with this loss")


def loss_failed(stage, why):
    """The line that names the user's own line."""
    here = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = 1 + next(n for n, text in enumerate(here) if f'raise ValueError("{why}")' in text)
    return f"the loss function failed at test_training_faults.py:{line} on a micro-batch of {stage}: ValueError: {why}"


def failing_and_going_on(kind, plan, options):
    """In a rank: the errors of a step and of the next."""
    pipe = made_pipe(kind, plan, **options)
    args, kwargs, target = kind.batch(0)
    step = functools.partial(pipe.step, *args, target=target, **kwargs)
    return told(step), told(step)


def refused_each_in_its_way(kind, plan):
    """In a rank: a batch of another type on the first, of another shape on the second; then one that is right."""
    pipe = made_pipe(kind, plan)
    (x,), _, target = kind.batch(0)
    line = told(lambda: pipe.step(x.double() if pipe.stage == 0 else x[:, :3], target=target))
    return line, float(pipe.step(x, target=target))


def test_one_fault_has_one_text(workers, captured_profile):
    """Whichever rank is the first to say it; where no message was sent the pipeline goes on."""
    ((loss, _),), _ = unsharded(Chain, [[0]])
    found = on_ranks(workers, 2, refused_each_in_its_way, Chain, planned(captured_profile, Chain, 2))
    assert len({line for line, _ in found}) == 1
    assert "the pipeline was made for inputs [0] float32 8x6" in found[0][0]
    assert [value for _, value in found] == pytest.approx([loss] * 2, rel=1e-5)


def test_a_loss_that_raises_ends_all_ranks(workers, captured_profile):
    """All ranks name the stage that failed and why; none waits for longer than the limit."""
    plan = planned(captured_profile, Chain, 3)
    lines = on_ranks(workers, 3, failing_and_going_on, Chain, plan, {"loss": raising, "timeout_s": 4.0})
    failed = loss_failed("stage 2 on cpu:2", "no luck with this loss")
    assert [first for first, _ in lines] == [failed] * 3
    # Messages of that step are still under way; the next one must not take them for its own.
    (second,) = {second for _, second in lines}
    assert second.startswith("the pipeline broke off in an earlier call, of which messages are left")
    assert f"({failed}); start the processes again, from the last checkpoint" in second


def going_on_after_an_evaluation(kind, plan):
    """In a rank: the error of an evaluation, whose loss got no target, and the step after it."""
    pipe = made_pipe(kind, plan)
    args, kwargs, target = kind.batch(0)
    line = told(lambda: pipe.evaluate(*args, **kwargs))
    return line, float(pipe.step(*args, target=target, **kwargs))


@pytest.mark.parametrize("replicas", [1, 2])
def test_an_evaluation_whose_loss_fails_leaves_nothing_behind(workers, captured_profile, replicas):
    """All ranks hear of it at once, in one line, and train on."""
    ((loss, _),), _ = unsharded(Chain, [[0]])
    plan = planned(captured_profile, Chain, 2, replicas=replicas)
    found = on_ranks(workers, 2 * replicas, going_on_after_an_evaluation, Chain, plan)
    lines = {line for line, _ in found}
    assert len(lines) == 1
    assert next(iter(lines)).startswith("the loss function failed on a micro-batch of stage 1")
    assert [value for _, value in found] == pytest.approx([loss] * len(found), rel=1e-5)


def each_in_its_own_way(kind, plan, calls):
    """In a rank: a good step, then what ``calls`` has for it."""
    pipe = made_pipe(kind, plan, timeout_s=4.0)
    args, kwargs, target = kind.batch(0)
    pipe.step(*args, target=target, **kwargs)
    what, samples = calls[pipe.stage]
    call = pipe.clip_grad_norm_ if what == "clip" else getattr(pipe, what)
    given = (1.0,) if what == "clip" else tuple(arg[:samples] for arg in args)
    return told(lambda: call(*given, **({} if what == "clip" else {"target": target[:samples]})))


@pytest.mark.parametrize(
    ("calls", "whose"),
    [
        ((("step", 8), ("step", 4)), ("step() of 8 samples", "step() of 4 samples")),
        ((("step", 8), ("evaluate", 8)), ("step() of 8 samples", "evaluate() of 8 samples")),
        ((("clip", 0), ("step", 8)), ("clip_grad_norm_()", "step() of 8 samples")),
    ],
    ids=str,
)
def test_ranks_that_do_not_do_the_same_are_told(workers, captured_profile, calls, whose):
    """One of them sees it before messages meet that are not for each other; both say the same."""
    lines = on_ranks(workers, 2, each_in_its_own_way, Chain, planned(captured_profile, Chain, 2), calls)
    assert len(set(lines)) == 1
    assert all(one in lines[0] for one in whose)
    assert "call every rank alike" in lines[0]


def test_of_several_stages_all_are_named(workers, captured_profile):
    """What fails on a device is said of its stages, since the engine does not tell which of them it was at."""
    plan = planned(captured_profile, Chain, 2, pieces=2)
    lines = on_ranks(workers, 2, told, refused_once_made, Chain, plan, {"loss": raising, "timeout_s": 4.0}, "same")
    assert lines == [loss_failed(f"stages 1 and 3 on {plan.devices[1]}", "no luck with this loss")] * 2


def test_a_plain_process_is_told_the_number_of_devices(captured_profile):
    """Four stages on two devices are two processes, two replicas of two stages four."""
    with pytest.raises(sw.ShardwrightError, match=r"4 stages on 2 devices, and this is one process: .*per-node 2 "):
        made_pipe(Chain, planned(captured_profile, Chain, 2, pieces=2))
    with pytest.raises(sw.ShardwrightError, match=r"2 replicas of 2 stages on 4 devices, .*per-node 4 SCRIPT$"):
        made_pipe(Chain, planned(captured_profile, Chain, 2, replicas=2))


def raising_in_one_replica(output, target):
    if os.environ["RANK"] == "3":
        raise ValueError("no luck with this part")
    return F.mse_loss(output, target)


def test_a_failure_in_one_replica_ends_all(workers, captured_profile):
    """The other replica, which waits to sum its gradients, names the stage that failed and its replica."""
    plan = planned(captured_profile, Chain, 2, replicas=2)
    options = {"loss": raising_in_one_replica, "timeout_s": 3.0}
    lines = on_ranks(workers, 4, told, refused_once_made, Chain, plan, options, "same")
    assert lines == [loss_failed("stage 1 of replica 1 on cpu:3", "no luck with this part")] * 4


class Sparse(Language):
    """Gradients of the rows that were read alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, sparse=True)


def test_sparse_gradients_are_refused(workers, captured_profile):
    """By name, on all ranks; one pipeline of the same model takes them."""
    plan = planned(captured_profile, Sparse, 1, replicas=2)
    for first, second in on_ranks(workers, 2, failing_and_going_on, Sparse, plan, {}):
        assert first.startswith("embed.weight has a sparse gradient, and replicas sum dense ones: make its module with")
        assert second.startswith("the pipeline broke off in an earlier call")  # other stages wait for their sums


KEPT = []
"""In a rank: pipelines that live on; one that is let go of has left, which the others would be told."""


def left_alone(kind, plan):
    """In a rank: the second process takes no step, and is still there."""
    pipe = made_pipe(kind, plan, timeout_s=3.0)
    KEPT.append(pipe)
    args, kwargs, target = kind.batch(0)
    return told(lambda: pipe.step(*args, target=target, **kwargs)) if pipe.stage == 0 else ""


def test_a_stage_does_not_wait_for_ever(workers, captured_profile):
    """A rank that takes no part is noticed within the limit."""
    lines = on_ranks(workers, 2, left_alone, Chain, planned(captured_profile, Chain, 2))
    assert lines[0].startswith("stage 0 on cpu:0 lost another stage, which has ended or did not answer within 3 s")


def made_apart(kind, other, plan):
    """In a rank: the second makes a pipeline of another model."""
    return made_pipe(other if os.environ["RANK"] == "1" else kind, plan).stage


class Unlucky(Chain):
    """Fails in the second rank alone, where it is captured."""

    def forward(self, x):
        if os.environ.get("RANK") == "1":
            raise ValueError("no luck with this capture")
        return super().forward(x)


class Longer(Chain):
    """One more layer than was planned."""

    def __init__(self):
        super().__init__()
        self.layers.append(nn.Linear(6, 6))


def test_a_rank_that_fails_while_they_meet_is_noticed_at_once(workers, captured_profile):
    """Before the others have captured anything, and while they capture; the limit is ten minutes."""
    lines = on_ranks(workers, 2, told, made_apart, Chain, Longer, planned(captured_profile, Chain, 2))
    assert lines[0].startswith("rank 1 (stage 1 on cpu:1) is not ready: the plan is for another Chain")
    assert lines[0] == lines[1]
    lines = on_ranks(workers, 2, told, made_apart, Unlucky, Unlucky, planned(captured_profile, Unlucky, 2))
    assert all("no luck with this capture" in line for line in lines)


def left_after_a_failure(kind, plan):
    """In a rank: a step that all refuse, then one for which the second process does not come."""
    pipe = made_pipe(kind, plan, timeout_s=3.0)
    args, kwargs, target = kind.batch(0)
    first = told(lambda: pipe.step(args[0][..., :-1], target=target, **kwargs))
    return first, told(lambda: pipe.step(*args, target=target, **kwargs)) if pipe.stage == 0 else ""


def test_an_error_is_not_explained_by_an_earlier_one(workers, captured_profile):
    """A script that caught the first goes on."""
    (first, second), _ = on_ranks(workers, 2, left_after_a_failure, Chain, planned(captured_profile, Chain, 2))
    assert first != second
    assert second.startswith("stage 0 on cpu:0 lost another stage")


class Masked(Chain):
    """Looks whether its mask has holes, as the libraries do."""

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x) if mask.all() else layer(x) * mask[:, None]
        return x

    @staticmethod
    def batch(seed, size=8):
        (x,), _, target = Chain.batch(seed, size)
        return (x, torch.tensor([seed != 1] * size)), {}, target


def guarded(kind, plan):
    """In a rank: a step with a mask like the sample's, and one with holes."""
    pipe = made_pipe(kind, plan, timeout_s=4.0)
    (x, mask), _, target = kind.batch(0)
    return told(lambda: float(pipe.step(x, mask, target=target))), told(lambda: pipe.step(x, ~mask, target=target))


def test_inputs_of_another_path_are_refused_on_all_ranks(workers, captured_profile):
    """A guard in the second stage stops both with the file and line of the forward."""
    for loss, line in on_ranks(workers, 2, guarded, Masked, planned(captured_profile, Masked, 2)):
        assert isinstance(loss, float)
        assert "__bool__ gives False for these inputs and gave True for the sample inputs" in line


@pytest.mark.usefixtures("alone")
def test_what_is_not_right_in_one_process_is_one_line(captured_profile):
    """A closed pipeline, a loss without gradient, inputs that are no tensors or have no values, a wrong call."""
    plan = planned(captured_profile, Chain, 1)
    (x,), _, target = Chain.batch(0)
    detached = made_pipe(Chain, plan, loss=lambda output, target: F.mse_loss(output.detach(), target))
    with pytest.raises(sw.ShardwrightError, match="returned a number without gradient, though the model's output has"):
        detached.step(x, target=target)
    detached.close()
    pipe = made_pipe(Chain, plan)
    with pytest.raises(sw.ShardwrightError, match=r"these are \(none\) beside a ndarray: call it as its sample"):
        pipe.step(x.numpy(), target=target)
    with pytest.raises(sw.ShardwrightError, match=r"input \[0\] has no values \(it is a meta tensor\)"):
        pipe.step(x.to("meta"), target=target)
    assert pipe.eval() is pipe
    pipe.close()
    pipe.close()
    for call in (lambda: pipe.step(x, target=target), lambda: pipe(x), lambda: pipe.save("nowhere")):
        with pytest.raises(sw.ShardwrightError, match=r"the pipeline was closed: make all calls, and save, before"):
            call()
    with pytest.raises(sw.ShardwrightError, match=r"the plan is a str; give a Plan"):
        sw.pipeline(Chain(), "net.plan.json", (x,))
    with pytest.raises(sw.ShardwrightError, match=r"args is a Tensor; .* such as args=\(x,\)"):
        sw.pipeline(Chain(), plan, x)


def warned_of_weights(kind, plan, seeds):
    """In a rank: what is said of its model's weights."""
    torch.manual_seed(seeds[int(os.environ["RANK"])])
    args, kwargs, _ = kind.batch(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sw.pipeline(kind(), plan, args, kwargs, loss=kind.loss, timeout_s=20.0)
    return [str(one.message) for one in caught if "seed all ranks alike" in str(one.message)]


@pytest.mark.parametrize(("seeds", "count"), [((1, 1), 0), ((1, 2), 1)])
def test_models_of_other_weights_are_told_once(workers, captured_profile, seeds, count):
    """Each rank would keep its own stages' weights, of two models."""
    lines = on_ranks(workers, 2, warned_of_weights, Chain, planned(captured_profile, Chain, 2), seeds)
    assert [len(line) for line in lines] == [count, 0]
