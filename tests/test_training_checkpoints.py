"""Checkpoints of a training by a plan: gone on with by other numbers of stages, and by PyTorch alone."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from training import (
    Chain,
    Language,
    adamw,
    alone,
    close,
    made,
    made_pipe,
    on_ranks,
    piped_step,
    plain_step,
    planned,
    unsharded,
    workers,
)

import shardwright as sw
from shardwright.sharder.runtime.placing.newfiles import NewFiles

__all__ = ["alone", "workers"]  # fixtures


def saved(kind, plan, folder, seeds):
    """In a rank: losses of some steps, and a checkpoint."""
    pipe = made_pipe(kind, plan)
    optimizer = adamw(pipe)
    curve = [piped_step(kind, pipe, optimizer, [seed]) for seed in seeds]
    pipe.save(folder, optimizer)
    return curve


def resumed(kind, plan, folder, seeds):
    """In a rank: losses of steps from a checkpoint on; the learning rate is the checkpoint's."""
    pipe = made_pipe(kind, plan)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.5)
    pipe.load(folder, optimizer)
    return [piped_step(kind, pipe, optimizer, [seed]) for seed in seeds]


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 1), (3, 1)), ((3, 1), (2, 2)), ((2, 2), (1, 1)), ((2, 1, 2), (3, 1)), ((3, 1), (2, 1, 2))],
)
def test_a_checkpoint_goes_on_with_another_number_of_stages(workers, captured_profile, tmp_path, before, after):
    """Weights, AdamW's moments and its settings: the curve is the one without a break, tied weights included.

    Stages on a device come after their devices, and the replicas after these.
    """
    expected, _ = unsharded(Language, [[seed] for seed in range(6)])
    plans = {n: planned(captured_profile, Language, n[0], 4, *n[1:]) for n in (before, after)}
    counts = [len(plan.devices) for plan in plans.values()]
    first = on_ranks(workers, counts[0], saved, Language, plans[before], tmp_path, range(3))
    second = on_ranks(workers, counts[1], resumed, Language, plans[after], tmp_path, range(3, 6))
    assert close(first[0] + second[-1], expected)


class Told(nn.Linear):
    """A layer that saves a word beside its tensors."""

    word = "as made"

    def get_extra_state(self):
        return self.word

    def set_extra_state(self, state):
        self.word = state


class Telling(Language):
    """A language model with such a layer."""

    def __init__(self):
        super().__init__()
        self.layers[0] = Told(6, 6)


def state_handed_out(kind, plan):
    """In a rank: load the whole state from rank 0, where all weights are one; whether the stage has that then."""
    pipe = made_pipe(kind, plan)
    whole = {
        key: torch.ones_like(value) if isinstance(value, torch.Tensor) else "handed out"
        for key, value in made(kind).state_dict().items()
    }
    pipe.load_state_dict(whole if (pipe.replica, pipe.stage) == (0, 0) else {}, full=True)
    return all(
        bool((value == 1).all()) if isinstance(value, torch.Tensor) else value == "handed out"
        for value in pipe.state_dict().values()
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_rank_0_hands_out_a_state(workers, captured_profile, replicas):
    """The counterpart of gathering: only rank 0 need have read the file."""
    plan = planned(captured_profile, Telling, 2, replicas=replicas)
    assert all(on_ranks(workers, 2 * replicas, state_handed_out, Telling, plan))


@pytest.mark.usefixtures("alone")
def test_one_stage_needs_no_launcher(captured_profile):
    """In a plain process a plan for one device trains as the model does, and leaves no process group behind."""
    expected, _ = unsharded(Chain, [[0], [1]])
    pipe = made_pipe(Chain, planned(captured_profile, Chain, 1))
    optimizer = adamw(pipe)
    assert close([piped_step(Chain, pipe, optimizer, [seed]) for seed in range(2)], expected)
    pipe.close()
    assert not dist.is_initialized()


def saved_once(kind, plan, folder):
    """In a rank: one step, and a checkpoint."""
    pipe = made_pipe(kind, plan)
    optimizer = adamw(pipe)
    piped_step(kind, pipe, optimizer, [0])
    pipe.save(folder, optimizer)


def resumed_without_us(kind, folder):
    """In one process: the whole model goes on from a pipeline's checkpoint by what PyTorch has; one more step."""
    model = made(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    return plain_step(model, optimizer, [1])


def test_the_whole_model_resumes_by_pytorch_alone(workers, captured_profile, tmp_path):
    """The checkpoint's layout is that of torch.distributed.checkpoint, for the model and its optimizer."""
    on_ranks(workers, 2, saved_once, Chain, planned(captured_profile, Chain, 2), tmp_path)
    expected, _ = unsharded(Chain, [[0], [1]])
    assert close(on_ranks(workers, 1, resumed_without_us, Chain, tmp_path), expected[1:])


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_that_fails_leaves_the_one_before(captured_profile, tmp_path, monkeypatch):
    """Whether it fails in the data or in what says where they are; and one that succeeds leaves no other's files."""
    pipe = made_pipe(Chain, planned(captured_profile, Chain, 1))
    (tmp_path / "notes.txt").write_text("mine")
    pipe.save(tmp_path)
    saved = {name: value.clone() for name, value in pipe.state_dict().items()}
    files = {path.name for path in tmp_path.iterdir()}
    with torch.no_grad():
        for parameter in pipe.parameters():
            parameter.add_(1.0)

    def fail(*_args, **_kwargs):
        raise OSError(28, "no space left")

    write = NewFiles.write_data

    def write_and_fail(*args):
        write(*args).wait()
        fail()

    for where, what, does in ((NewFiles, "write_data", write_and_fail), (filesystem.pickle, "dump", fail)):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, does)
            with pytest.raises(
                sw.ShardwrightError, match=r"cannot write the checkpoint into .*: rank 0: OSError: .*no space left"
            ):
                pipe.save(tmp_path)
        other = made_pipe(Chain, planned(captured_profile, Chain, 1))
        other.load(tmp_path)
        assert all(torch.equal(other.state_dict()[name], value) for name, value in saved.items())
    pipe.save(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left & files == {"notes.txt", ".metadata"}
    assert len(left) == len(files)
    pipe.load(tmp_path)
    assert not torch.equal(pipe.state_dict()[name := next(iter(saved))], saved[name])
