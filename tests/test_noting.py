"""Notes of a step: the engine's calls are noted under a clock that counts, and everything is put back."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining import PipelineStage, schedules

from shardwright.sharder.runtime.piping.noting import Notes, StreamClock


class Counting:
    """A clock that is one second further each time it is read."""

    def __init__(self):
        self.moment = 0.0

    def now(self):
        self.moment += 1.0
        return self.moment

    def seconds(self, moment):
        return moment


class Stage:
    """As much of a stage as the engine's schedules call."""

    prompt = False

    def forward_one_chunk(self, number, args):
        return number, args

    def backward_one_chunk(self, number, *, loss):
        return number, loss

    def get_fwd_recv_ops(self, number):
        return [SimpleNamespace(kind="irecv", number=number) for _ in range(2)]

    def get_fwd_send_ops(self, number):
        return [SimpleNamespace(kind="isend", number=number)]

    get_bwd_recv_ops, get_bwd_send_ops = get_fwd_recv_ops, get_fwd_send_ops


@pytest.fixture
def posted(monkeypatch):
    """Operations that were posted; each of their works is done when it is awaited."""
    seen = []

    def batch(operations, **_described):
        seen.extend(operations)
        return [SimpleNamespace(wait=lambda: None) for _ in operations]

    monkeypatch.setattr(schedules, "_batch_p2p", batch)
    return seen


def test_each_slot_is_noted_by_name_and_microbatch(posted):
    """Waits carry the name of the message that they are for, also when sends and receives are posted at once."""
    stage, notes = Stage(), Notes(torch.device("cpu"), Counting())
    with notes.engine([stage], train=True), notes.whole():
        schedules._wait_batch_p2p(schedules._batch_p2p(stage.get_fwd_recv_ops(3), desc="fwd_recv"))
        assert stage.forward_one_chunk(3, "x") == (3, "x")
        together = stage.get_fwd_send_ops(3) + stage.get_bwd_recv_ops(2)
        schedules._wait_batch_p2p(schedules._batch_p2p(together))
        assert stage.backward_one_chunk(2, loss="l") == (2, "l")
    noted = notes.noted()
    assert [(mark.what, mark.microbatch) for mark in noted.marks] == [
        ("receive activations", 3),
        ("receive activations", 3),
        ("forward", 3),
        ("send activations", 3),
        ("receive gradients", 2),
        ("receive gradients", 2),
        ("backward", 2),
    ]
    assert len(posted) == 5
    assert [(post.what, post.microbatch) for post in noted.posts] == [
        ("receive activations", 3),
        ("send activations", 3),
        ("receive gradients", 2),
    ]
    moments = [noted.start_s, *(at for mark in noted.marks for at in (mark.start_s, mark.end_s)), noted.end_s]
    assert moments == sorted(set(moments))
    first = {post.what: post.start_s for post in noted.posts}
    assert all(first[mark.what] < mark.start_s for mark in noted.marks if mark.what in first)


def test_transfers_of_a_prompt_stage_begin_with_their_sends(posted):
    """Its receives are posted before it comes to them; its sends write in their calls, which are of the transfer."""
    stage, notes = Stage(), Notes(torch.device("cpu"), Counting())
    stage.prompt = True
    with notes.engine([stage], train=True), notes.whole():
        schedules._wait_batch_p2p(schedules._batch_p2p(stage.get_fwd_recv_ops(3), desc="fwd_recv"))
        works = schedules._batch_p2p(stage.get_fwd_send_ops(3))
        stage.forward_one_chunk(4, "x")
        schedules._wait_batch_p2p(works)
    noted = notes.noted()
    assert [post.what for post in noted.posts] == ["send activations"]
    assert [(mark.what, mark.microbatch) for mark in noted.marks] == [
        *[("receive activations", 3)] * 2,
        ("send activations", 3),
        ("forward", 4),
        ("send activations", 3),
    ]
    assert len(posted) == 3


def test_works_that_stand_for_several_operations_are_for_what_is_received(monkeypatch):
    """NCCL makes one work of a batch."""
    one = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(schedules, "_batch_p2p", lambda _operations: [one])
    stage, notes = Stage(), Notes(torch.device("cpu"), Counting())
    with notes.engine([stage], train=True), notes.whole():
        schedules._wait_batch_p2p(schedules._batch_p2p(stage.get_bwd_send_ops(0) + stage.get_fwd_recv_ops(1)))
    assert [(mark.what, mark.microbatch) for mark in notes.noted().marks] == [("receive activations", 1)]


def test_what_is_of_no_message_passes_unnoted(posted):
    """The engine's own exchange, as when it sets itself up, goes on as it would without notes."""
    stage, notes, waited = Stage(), Notes(torch.device("cpu"), Counting()), []
    own = SimpleNamespace(wait=lambda: waited.append(True))
    with notes.engine([stage], train=True), notes.whole():
        schedules._batch_p2p([SimpleNamespace(kind="isend")])
        schedules._wait_batch_p2p([own])
    assert (len(posted), waited) == (1, [True])
    assert notes.noted().marks == notes.noted().posts == ()


def test_without_training_no_backward_is_noted():
    """The engine calls one that does nothing."""
    stage, notes = Stage(), Notes(torch.device("cpu"), Counting())
    with notes.engine([stage], train=False), notes.whole():
        stage.forward_one_chunk(0, "x")
        stage.backward_one_chunk(0, loss=None)
    assert [mark.what for mark in notes.noted().marks] == ["forward"]


def test_moments_of_a_gpu_are_told_on_the_hosts_clock(monkeypatch):
    """Events count from the first one, which the host has seen pass: seconds of both clocks are then the same."""
    stream = iter([100.0, 103.5])  # milliseconds since some start of the device

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream_of):
            self.at = next(stream) if stream_of == "stream" else None

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    clock = StreamClock(torch.device("cuda:0"))
    assert clock.seconds(clock.now()) - clock.origin_s == pytest.approx(3.5e-3)


def test_everything_is_put_back_even_after_an_error():
    """Neither the stage nor the engine's module keeps a wrapper, so later steps are as they were."""
    stage, before = Stage(), (schedules._batch_p2p, schedules._wait_batch_p2p)

    def fails():
        with Notes(torch.device("cpu")).engine([stage], train=True):
            assert vars(stage)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert not vars(stage)
    assert (schedules._batch_p2p, schedules._wait_batch_p2p) == before


def test_this_torch_has_what_is_wrapped():
    """Names of the engine that no documentation promises."""
    for name in vars(Stage).keys() - {"prompt"}:
        assert name.startswith("__") or callable(getattr(PipelineStage, name))
