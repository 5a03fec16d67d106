"""Training by a plan in the processes of a script: the unsharded model's losses, whichever way it is divided."""

import gc
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from training import (
    Branches,
    Chain,
    Checkpointed,
    Language,
    adamw,
    close,
    made,
    made_pipe,
    on_ranks,
    piped_step,
    planned,
    sizes,
    unsharded,
    workers,
)

import shardwright as sw

__all__ = ["workers"]  # fixtures

STEPS = 4


def trained(kind, plan, steps, options):
    """In a rank: losses and norms, the whole state on rank 0, what the stage holds, and what is left of the model."""
    model = made(kind)
    args, kwargs, _ = kind.batch(0)
    pipe = sw.pipeline(model, plan, args, kwargs, loss=kind.loss, timeout_s=20.0)
    optimizer = adamw(pipe)
    curve = [piped_step(kind, pipe, optimizer, seeds, **options) for seeds in steps]
    values = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.is_meta}
    own = {name for name, _ in pipe.named_parameters()}
    return curve, pipe.state_dict(full=True), set(pipe.state_dict()), own, values


@pytest.mark.parametrize(
    ("kind", "stages", "options"),
    [
        (Chain, 3, {}),
        (Branches, 2, {}),
        (Language, 3, {}),
        (Branches, 3, {}),
        (Language, 3, {"recompute": "always"}),
        (Checkpointed, 2, {}),
        (Checkpointed, 2, {"recompute": "always"}),
        (Checkpointed, 2, {"schedule": "zero-bubble"}),
        (Chain, 3, {"pieces": 2}),
        (Branches, 2, {"pieces": 2}),
        (Language, 2, {"pieces": 3}),
        (Chain, 1, {"replicas": 2}),
        (Branches, 2, {"replicas": 2}),
        (Language, 2, {"replicas": 2}),
        (Chain, 2, {"replicas": 2, "pieces": 2}),
        (Language, 2, {"replicas": 2, "recompute": "always"}),
        (Chain, 3, {"schedule": "zero-bubble"}),
        (Branches, 2, {"schedule": "zero-bubble"}),
        (Branches, 3, {"schedule": "zero-bubble"}),
        (Language, 3, {"schedule": "zero-bubble"}),
    ],
)
def test_a_pipeline_trains_as_the_model_does(workers, captured_profile, kind, stages, options):
    """Losses of four AdamW steps on every rank, and all weights after them, are the unsharded model's."""
    steps = [[seed] for seed in range(STEPS)]
    expected, model = unsharded(kind, steps)
    plan = planned(captured_profile, kind, stages, **options)
    results = on_ranks(workers, len(plan.devices), trained, kind, plan, steps, {})
    for curve, *_ in results:
        assert close(curve, expected)
    whole = results[0][1]
    assert list(whole) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.allclose(whole[key], value, rtol=1e-4, atol=1e-5), key
    assert all(not result[1] for result in results[1:])
    held = [result[2] for result in results]
    assert set.union(*held) == set(model.state_dict())
    for _, _, state, own, values in results:
        assert own <= state
        assert values <= state  # of the other stages nothing is kept


def interfaces(kind, plan, given):
    """In a rank: ``GLOO_SOCKET_IFNAME`` where the engine's groups are made, after it, and after a refusal."""
    name, seen, made_by_us = "GLOO_SOCKET_IFNAME", [], dist.new_group
    os.environ.pop(name, None)
    os.environ |= {name: given} if given else {}
    dist.new_group = lambda *args, **options: (seen.append(os.environ.get(name)), made_by_us(*args, **options))[1]
    try:
        made_pipe(kind, plan).close()
    finally:
        dist.new_group = made_by_us
    after = os.environ.get(name)
    with pytest.raises(sw.ShardwrightError):
        made_pipe(Chain, plan)
    return {*seen}, after, os.environ.get(name)


@pytest.mark.parametrize("given", ["lo", None])
def test_the_interface_is_the_script_s_again(workers, captured_profile, given):
    """All groups, those of tied weights too, are made over the chosen one; then the variable is as it was."""
    if sys.platform != "linux":
        pytest.skip("other systems call loopback otherwise")
    plan = planned(captured_profile, Language, 2)
    assert on_ranks(workers, 2, interfaces, Language, plan, given) == [({"lo"}, given, given)] * 2


def one_after_another(plan, late):
    """In a rank: the losses of three pipelines, each left before the next; ``late`` takes a while to leave."""
    leave, losses = dist.destroy_process_group, []
    if os.environ["RANK"] == str(late):
        dist.destroy_process_group = lambda *args: (time.sleep(0.3), leave(*args))[1]
    args, kwargs, target = Chain.batch(0)
    try:
        for _ in range(3):
            pipe = made_pipe(Chain, plan)
            losses.append(float(pipe.step(*args, target=target, **kwargs)))
            pipe.close()
            del pipe
            gc.collect()  # the last to hold what is left
    finally:
        dist.destroy_process_group = leave
    return losses


@pytest.mark.parametrize("late", [0, 1])
def test_pipelines_follow_one_another(workers, captured_profile, late):
    """The host of the store may be the last to leave: the others do not wait in a store that ends."""
    plan = planned(captured_profile, Chain, 2)
    first, second = on_ranks(workers, 2, one_after_another, plan, late)
    assert first == second == [first[0]] * 3


def with_groups_between(plan):
    """In a rank: the losses of two pipelines, with groups of the script's own, made anew each time, around them."""
    losses = []
    args, kwargs, target = Chain.batch(0)
    for _ in range(2):
        for _ in range(3):
            dist.init_process_group("gloo")
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total == 2
            dist.destroy_process_group()
            gc.collect()
            time.sleep(0.2)  # the script's: rank 0's store ends with the group
        pipe = made_pipe(Chain, plan)
        losses.append(float(pipe.step(*args, target=target, **kwargs)))
        pipe.close()
    return losses


def test_a_script_may_make_groups_of_its_own_between(workers, captured_profile):
    """What a pipeline leaves behind is not in their way: the ranks meet at the same port."""
    plan = planned(captured_profile, Chain, 2)
    first, second = on_ranks(workers, 2, with_groups_between, plan)
    assert first == second == [first[0]] * 2


def hosted(function, *args):
    """In a rank whose stages exchange through the host's memory, as those of a plan over kinds of devices do."""
    from shardwright.sharder.runtime.piping import ranks

    before, ranks.is_hosted = ranks.is_hosted, lambda _: True
    try:
        return function(*args)
    finally:
        ranks.is_hosted = before


@pytest.mark.parametrize(
    ("kind", "options"), [(Branches, {}), (Language, {"recompute": "always"}), (Chain, {"replicas": 2, "pieces": 2})]
)
def test_stages_of_several_kinds_of_devices_train_alike(workers, captured_profile, kind, options):
    """What the plain model learns, ties and what is computed anew included."""
    steps = [[0, 1], [2]]
    expected, model = unsharded(kind, steps, clip=0.5)
    plan = planned(captured_profile, kind, 2, **options)
    results = on_ranks(workers, len(plan.devices), hosted, trained, kind, plan, steps, {"clip": 0.5})
    assert all(close(curve, expected) for curve, *_ in results)
    for key, value in model.state_dict().items():
        assert torch.allclose(results[0][1][key], value, rtol=1e-4, atol=1e-5), key


def autocast_on_one(kind, plan):
    """The error of a rank of which only the second computes in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=os.environ["RANK"] == "1"):
        try:
            made_pipe(kind, plan)
        except sw.ShardwrightError as error:
            return str(error)


def test_kinds_of_devices_under_unequal_autocast_are_refused(workers, captured_profile):
    """A region of one kind would leave the other's stages in another precision than their neighbours send."""
    plan = planned(captured_profile, Chain, 2)
    errors = on_ranks(workers, 2, hosted, autocast_on_one, Chain, plan)
    assert errors == [errors[0]] * 2
    assert errors[0].startswith("rank 1 has an autocast dtype other than rank 0's; enter torch.autocast for each kind")


@pytest.mark.parametrize("options", [{}, {"pieces": 2}, {"replicas": 2}])
def test_gradients_accumulate_and_are_clipped(workers, captured_profile, options):
    """Two batches a step, a norm over all stages with tied weights once: as the unsharded model's."""
    steps = [[0, 1], [2, 3], [4, 5]]
    expected, _ = unsharded(Language, steps, clip=0.5)
    plan = planned(captured_profile, Language, 2, **options)
    for curve, *_ in on_ranks(workers, len(plan.devices), trained, Language, plan, steps, {"clip": 0.5}):
        assert close(curve, expected)
    assert min(norm for _, norm in expected) > 0.5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Branches, {}),
        (Language, {}),
        (Branches, {"pieces": 2}),
        (Branches, {"replicas": 2}),
        (Branches, {"schedule": "zero-bubble"}),
    ],
)
def test_batches_of_any_size(workers, captured_profile, kind, options):
    """A last partial batch, one that only divides by itself, and a larger one: losses and results are the model's."""
    batches = [(0, 8), (1, 6), (2, 7), (3, 16), (4, 3), (5, 8), (6, 10)]
    batches = [(seed, size) for seed, size in batches if size % options.get("replicas", 1) == 0]
    model = made(kind)
    optimizer, expected = adamw(model), []
    for seed, size in batches:
        args, kwargs, target = kind.batch(seed, size)
        optimizer.zero_grad()
        loss = kind.loss(model(*args, **kwargs), target)
        loss.backward()
        optimizer.step()
        loss = float(loss.detach())
        expected.append((loss, model(*args, **kwargs)))
    plan = planned(captured_profile, kind, 2, **options)
    for found in on_ranks(workers, len(plan.devices), sizes, kind, plan, batches):
        for (evaluated, loss, output), (expected_loss, expected_output) in zip(found, expected, strict=True):
            assert evaluated == pytest.approx(expected_loss, rel=1e-5)
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            torch.testing.assert_close(output, expected_output, rtol=1e-4, atol=1e-5)
