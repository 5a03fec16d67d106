"""What runs in the workers on a link, in one process: patterns, copies, and what is counted as wrong."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.profiler.links import fit, one_way
from shardwright.profiler.measuring import messages
from shardwright.profiler.measuring.messages import (
    CASES,
    REPEATS,
    SIZES,
    check_copies,
    copies_for,
    copy_within,
    exchange,
    has_peer_access,
    pattern,
    ping_pong,
    probed_bytes,
)


class FakeWire:
    """Messages that take ``latency + size / bandwidth`` of a clock that nothing else moves, the same at both ends."""

    def __init__(self, sending, receiving):
        self.lines = {"send": sending, "receive": receiving}
        self.now = 100.0

    def clock(self):
        return self.now

    def wait(self, operations):
        """All of them at once: as long as the longest."""
        self.now += max(self.lines[way][0] + len(buffer) / self.lines[way][1] for way, buffer, _ in operations)


def on_wire(monkeypatch, wire):
    monkeypatch.setattr(messages, "_wait", wire.wait)
    fake = SimpleNamespace(P2POp=lambda *operation: operation, isend="send", irecv="receive")
    monkeypatch.setattr(messages, "dist", fake)


def test_a_ping_pong_tells_the_directions_apart(monkeypatch):
    """Of a link that is slow one way only, each way's latency and bandwidth are found exactly."""
    there, back = (1e-4, 1e9), (3e-3, 2e8)
    turns = []
    for first, wire in ((True, FakeWire(there, back)), (False, FakeWire(back, there))):
        on_wire(monkeypatch, wire)
        turns.append(ping_pong(1, first, clock=wire.clock))
    assert all(len(t.sent) == len(t.arrived) == REPEATS for end in turns for t in end.values())
    assert fit(one_way(turns[0], turns[1])) == pytest.approx(there, rel=1e-6)
    assert fit(one_way(turns[1], turns[0])) == pytest.approx(back, rel=1e-6)


def test_an_exchange_takes_until_both_messages_are_done(monkeypatch):
    """Sending and receiving go on together, and the slower of them counts."""
    wire = FakeWire((1e-4, 1e9), (3e-3, 2e8))
    on_wire(monkeypatch, wire)
    seconds = exchange(1, 2, clock=wire.clock)
    assert {size: len(each) for size, each in seconds.items()} == dict.fromkeys(SIZES, REPEATS)
    assert fit(seconds) == pytest.approx((3e-3, 2e8), rel=1e-6)


def pcg(number):
    """The published hash in Python's own integers."""
    state = (number * 747796405 + 2891336453) % 2**32
    word = (((state >> ((state >> 28) + 4)) ^ state) * 277803737) % 2**32
    return (word >> 22) ^ word


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**40), size=st.integers(1, 500))
def test_a_pattern_is_the_published_hash(seed, size):
    """Each byte is that of a counter's hash, in 64-bit tensors as in unbounded integers."""
    start = seed & 0x7FFFFFFF
    assert pattern(seed, size).tolist() == [pcg(start + i) & 0xFF for i in range(size)]


def test_patterns_of_two_seeds_have_nothing_in_common():
    """All byte values come about equally often, and another link's bytes, or the next message's, are other bytes."""
    seeds = [seed for first in (1, 2**32 - 1) for _, _, seed in messages._seeds(first)]
    patterns = [pattern(seed, 1 << 16) for seed in seeds]
    assert all(150 < n < 370 for p in patterns for n in torch.bincount(p.long(), minlength=256).tolist())
    for a in range(len(patterns)):
        for b in range(a):
            assert 0.001 < (patterns[a] == patterns[b]).double().mean() < 0.01


def test_odd_sizes_and_offsets_are_among_the_cases():
    """Messages of one byte, of odd lengths, and at odd places are checked beside those of whole pages."""
    assert any(size == 1 for size, _ in CASES)
    assert any(size % 2 and offset % 2 for size, offset in CASES)
    assert any(size % 4096 == 0 and offset == 0 for size, offset in CASES)
    assert probed_bytes() == sum(size for size, _ in CASES)


def test_without_nccl_copies_go_through_the_host(monkeypatch):
    """As a pipeline's do then."""
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert has_peer_access("cuda:0", "cuda:1") is False
    assert has_peer_access("cpu", "cuda:1") is None


@pytest.mark.parametrize("staged", [False, True])
def test_faithful_copies_have_no_wrong_bytes(monkeypatch, staged):
    """Direct or through the host's memory, what arrives is what was sent."""
    monkeypatch.setattr(messages, "has_peer_access", lambda *_: False if staged else None)
    through = []
    copy_through = messages._copy_through
    monkeypatch.setattr(messages, "_copy_through", lambda *args: through.append(args) or copy_through(*args))
    assert check_copies("cpu", "cpu", 5) == 0
    assert len(through) == (len(CASES) if staged else 0)


def forget(_source, _target, **_way):
    """Nothing arrives."""


def change_the_last_byte(source, target, **_way):
    target.copy_(source)
    target[-1] = ~source[-1]


def shift_by_one(source, target, **_way):
    target.copy_(source.roll(1))


@pytest.mark.parametrize(
    ("copy", "least", "most"),
    [
        (forget, probed_bytes(), probed_bytes()),
        (change_the_last_byte, len(CASES), len(CASES)),
        (shift_by_one, 0.99 * (probed_bytes() - 1), probed_bytes()),
    ],
)
def test_what_a_copy_spoils_is_counted(monkeypatch, copy, least, most):
    """Bytes that do not arrive, change or move are counted, each once."""
    monkeypatch.setattr(messages, "_copy", copy)
    assert least <= check_copies("cpu", "cpu", 5) <= most


def test_an_old_message_does_not_pass_for_the_next(monkeypatch):
    """A link that delivers the bytes of an earlier message of the same size is caught."""
    monkeypatch.setattr(messages, "CASES", ((4096, 0), (4096, 0)))
    sent = []

    def late(source, target, **_way):
        sent.append(source.clone())
        target.copy_(sent[0])

    monkeypatch.setattr(messages, "_copy", late)
    assert check_copies("cpu", "cpu", 5) > 4000


@pytest.mark.parametrize(
    ("source", "target", "setting", "possible", "expected"),
    [
        ("cuda:0", "cuda:1", None, True, True),
        ("cuda:0", "cuda:1", None, False, False),
        ("cuda:0", "cuda:1", "1", True, False),
        ("cuda:0", "cuda:1", "0", True, True),
        ("cuda:0", "cpu", None, True, None),
        ("cpu", "cpu", "1", True, None),
    ],
)
def test_which_way_a_copy_goes(monkeypatch, source, target, setting, possible, expected):
    """Between GPUs straight, where they can and NCCL is not told otherwise; no such thing where the host is one end."""
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: possible)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    if setting is not None:
        monkeypatch.setenv("NCCL_P2P_DISABLE", setting)
    assert has_peer_access(source, target) is expected


@pytest.mark.parametrize("staged", [False, True])
def test_copies_are_timed_at_each_size(monkeypatch, staged):
    """Alone and while others go on: the seconds of each copy, and never fewer than are needed."""
    monkeypatch.setattr(messages, "has_peer_access", lambda *_: False if staged else None)
    alone = copy_within("cpu", "cpu")
    assert list(alone) == list(SIZES)
    assert all(len(seconds) == REPEATS and min(seconds) > 0 for seconds in alone.values())
    assert len(copies_for("cpu", "cpu", 1 << 12, window_s=0.0)) == REPEATS
