"""Links: the fitted line, the rounds, real workers, and GPUs' copies with the workers made up."""

import itertools
import os
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.profiler import links as links_module
from shardwright.profiler.links import (
    disk_rate,
    fit,
    measure_engine,
    measure_links,
    one_way,
    rounds_of,
    warn_of_corrupt,
)
from shardwright.profiler.measuring import messages
from shardwright.profiler.measuring.messages import SIZES, Turns, probed_bytes
from shardwright.profiler.profile import Device, Link
from shardwright.profiler.workers.pool import Pool

lines = {"latency": st.floats(1e-6, 1e-2), "bandwidth": st.floats(1e6, 1e11)}
"""Of those that can be told apart by messages of ``SIZES``."""


def timed(latency, bandwidth, repeats=3):
    return {size: [latency + size / bandwidth] * repeats for size in SIZES}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(latency=st.floats(0, 1e-2), bandwidth=st.floats(1e6, 1e12))
def test_a_line_is_found_again(latency, bandwidth):
    """Messages that take latency + bytes / bandwidth give back both, as far as either can be seen in them."""
    samples = timed(latency, bandwidth)
    found_latency, found_bandwidth = fit(samples)
    assert found_latency == pytest.approx(latency, rel=1e-6, abs=1e-9 * samples[SIZES[-1]][0])
    predicted = [found_latency + size / found_bandwidth for size in SIZES]
    assert np.allclose(predicted, [seconds[0] for seconds in samples.values()], rtol=1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(**lines, at=st.sampled_from(SIZES), slower=st.floats(1, 1e6))
def test_one_slow_message_changes_nothing(latency, bandwidth, at, slower):
    """However late one message is, and whatever its size, the others of its size decide."""
    samples = timed(latency, bandwidth)
    before = fit(samples)
    samples[at][0] *= slower
    assert fit(samples) == before


@settings(max_examples=100, deadline=None, derandomize=True)
@given(**lines, slower=st.floats(0.01, 100))
def test_a_slower_clock_scales_the_line(latency, bandwidth, slower):
    """Times that are all so much longer give so much more latency and less bandwidth."""
    samples = {size: [slower * s for s in seconds] for size, seconds in timed(latency, bandwidth).items()}
    found_latency, found_bandwidth = fit(samples)
    assert found_latency == pytest.approx(slower * latency, rel=1e-4, abs=1e-9 * samples[SIZES[-1]][0])
    assert found_bandwidth == pytest.approx(bandwidth / slower, rel=1e-3)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(medians=st.lists(st.floats(1e-6, 1.0), min_size=len(SIZES), max_size=len(SIZES)))
def test_noise_never_gives_an_impossible_link(medians):
    """Whatever the times, latency is not negative and bandwidth positive and finite."""
    latency, bandwidth = fit({size: [s] for size, s in zip(SIZES, medians, strict=True)})
    assert latency >= 0
    assert 0 < bandwidth < float("inf")


def test_small_messages_count_as_much_as_large_ones():
    """A latency of 100 us is found beside messages of many ms."""
    samples = timed(1e-4, 1e9)
    samples[SIZES[-1]] = [1.02 * s for s in samples[SIZES[-1]]]
    assert fit(samples)[0] == pytest.approx(1e-4, rel=0.1)


@pytest.mark.parametrize("count", range(1, 9))
def test_rounds_hold_every_ordered_pair_once(count):
    """In each round each device sends to one and receives from one; over the rounds each ordered pair comes once."""
    names = [f"cuda:{i}" for i in range(count)]
    rounds = list(rounds_of(names))
    for pairs in rounds:
        assert sorted(source for source, _ in pairs) == sorted(target for _, target in pairs) == names
    every = [pair for pairs in rounds for pair in pairs]
    assert sorted(every) == sorted(itertools.permutations(names, 2))


def test_directions_are_told_apart():
    """A message takes from its begin at the sender to its arrival at the receiver: each direction has its time."""
    here, there = {8: Turns([0.0, 10.0], [7.0, 17.0])}, {8: Turns([2.0, 12.0], [2.0, 12.5])}
    assert one_way(here, there) == {8: [2.0, 2.5]}
    assert one_way(there, here) == {8: [5.0, 5.0]}


# Real workers. What follows runs in them: it changes how they send.


def spoil_what_goes_to_rank_1():
    """Flip one bit of every message longer than a page that this worker sends to rank 1."""
    from shardwright.profiler.measuring import messages

    send = messages._send

    def spoiling(message, peer):
        if peer == 1 and len(message) > 4096:
            message = message.clone()
            message[len(message) // 2] ^= 4
        send(message, peer)

    messages._send = spoiling


def talk_less():
    """Send each message twice, not ten times."""
    from shardwright.profiler.measuring import messages

    messages.REPEATS, messages.WARMUP = 2, 1


def die_instead_of_talking():
    from shardwright.profiler.measuring import messages

    messages.ping_pong = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def sleep_instead_of_talking():
    from shardwright.profiler.measuring import messages

    messages.ping_pong = lambda *_: time.sleep(60)


def workers(count):
    cores = sorted(os.sched_getaffinity(0))
    return [
        Device(name=f"cpu:{i}", kind="cpu", description="", memory_bytes=1, cores=(cores[i % len(cores)],))
        for i in range(count)
    ]


def start(pool, devices):
    """Wait until they are there; their first call imports PyTorch."""
    from shardwright.profiler.measure import prepare

    pool.call({d.name: (prepare, (d.name, 1)) for d in devices}, limit_s=120)


def test_three_workers_and_a_link_that_spoils_what_it_carries():
    """Every ordered pair is timed alone and with all others, and checked; flipped bits count on their link alone."""
    devices = workers(3)
    with Pool(devices) as pool:
        start(pool, devices)
        pool.call({device.name: (talk_less, ()) for device in devices}, limit_s=60)
        clean = measure_links(pool, devices)
        engine = measure_engine(pool, devices, train=True)
        pool.call({"cpu:2": (spoil_what_goes_to_rank_1, ())}, limit_s=60)
        spoilt = measure_links(pool, devices)
    names = [device.name for device in devices]
    assert [(link.source, link.target) for link in clean] == list(itertools.permutations(names, 2))
    assert engine.keys() == {*names}
    assert all(seconds > 0 for seconds in engine.values())
    assert measure_engine(pool, devices[:1], train=True) == {}
    assert not any(link.corrupt for link in clean)
    assert all(link.probed_bytes == probed_bytes() and link.peer is None for link in clean)
    assert all(link.busy_latency_s is not None and link.busy_bandwidth_bytes_per_s > 1e6 for link in clean)
    wrong = {(link.source, link.target): link.wrong_bytes for link in spoilt}
    longer = sum(size > 4096 for size, _ in messages.CASES)
    assert wrong == dict.fromkeys(wrong, 0) | {("cpu:2", "cpu:1"): longer}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (die_instead_of_talking, "worker cpu:1 was killed by SIGKILL"),
        (sleep_instead_of_talking, "did not answer within 3 s"),
    ],
)
def test_what_fails_on_a_link_names_the_link(monkeypatch, spoil, says):
    """A worker that dies or hangs while a link is measured gives one line with both ends of it."""
    devices = workers(2)
    with Pool(devices) as pool:
        start(pool, devices)
        pool.call({"cpu:1": (spoil, ())}, limit_s=60)
        call = links_module._call
        limits = iter([60.0])  # of entering the group; a limit of 3 s for the rest

        def limited(*args):
            monkeypatch.setattr(links_module, "LIMIT_S", next(limits, 3.0))
            return call(*args)

        monkeypatch.setattr(links_module, "_call", limited)
        with pytest.raises(ShardwrightError, match="the link cpu:0 -> cpu:1 could not be measured") as caught:
            measure_links(pool, devices)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# GPUs, of which only the workers' part needs one.


class PoolOfOne:
    """Runs every call at once in this process, and remembers which device it was for."""

    def __init__(self):
        self.calls = []

    def call(self, calls, **_limit):
        self.calls += [(name, function.__name__, args) for name, (function, args) in calls.items()]
        return {name: function(*args) for name, (function, args) in calls.items()}


@pytest.fixture
def made_up_links(monkeypatch):
    """Copies at 10 GB/s, half of it all at once, spoilt from cuda:1 to cuda:0; messages at 1 GB/s, spoilt on a GPU."""

    def taking(rate, size):
        return [1e-5 + size / rate]

    def check_copies(source, target, _seed):
        return 17 if (source, target) == ("cuda:1", "cuda:0") else 0

    def ping_pong(_peer, _first, _device):
        return {size: Turns([0.0], taking(1e9, size)) for size in SIZES}

    made_up = {
        "copy_within": lambda *_: {size: taking(1e10, size) for size in SIZES},
        "copies_for": lambda _source, _target, size: taking(5e9, size),
        "check_copies": check_copies,
        "has_peer_access": lambda source, target: source < target,
        "ping_pong": ping_pong,
        "exchange": lambda *_: {size: taking(5e8, size) for size in SIZES},
        "send_patterns": lambda *_: None,
        "check_received": lambda _peer, _seed, device: 5 if device == "cuda:1" else 0,
        "join": lambda *_: None,
        "leave": lambda: None,
    }
    for name, function in made_up.items():
        function.__name__ = name
        monkeypatch.setattr(links_module, name, function)


@pytest.mark.usefixtures("made_up_links")
def test_links_of_gpus():
    """Two GPUs are linked by copies in the first one's process, a CPU worker and a GPU by messages of both."""
    devices = [
        Device(name=name, kind=name[:-2], description="", memory_bytes=1) for name in ("cuda:0", "cpu:0", "cuda:1")
    ]
    pool = PoolOfOne()
    found = {(link.source, link.target): link for link in measure_links(pool, devices)}
    assert len(found) == 6
    fast, slow = found["cuda:0", "cuda:1"], found["cpu:0", "cuda:1"]
    assert (fast.latency_s, fast.bandwidth_bytes_per_s) == pytest.approx((1e-5, 1e10))
    assert (fast.busy_latency_s, fast.busy_bandwidth_bytes_per_s) == pytest.approx((1e-5, 5e9))
    assert (slow.latency_s, slow.bandwidth_bytes_per_s) == pytest.approx((1e-5, 1e9))
    assert (slow.busy_latency_s, slow.busy_bandwidth_bytes_per_s) == pytest.approx((1e-5, 5e8))
    assert (fast.peer, found["cuda:1", "cuda:0"].peer, slow.peer) == (True, False, None)
    assert {pair: link.wrong_bytes for pair, link in found.items() if link.corrupt} == {
        ("cuda:1", "cuda:0"): 17,
        ("cpu:0", "cuda:1"): 5,
    }
    calls = {function: [] for _, function, _ in pool.calls}
    for name, function, args in pool.calls:
        calls[function].append((name, args))
    assert {name: args[0] for name, args in calls["copy_within"]} == {"cuda:0": "cuda:0", "cuda:1": "cuda:1"}
    assert {(name, args[2]) for name, args in calls["ping_pong"]} == {
        ("cuda:0", "cuda:0"),
        ("cpu:0", "cpu"),
        ("cuda:1", "cuda:1"),
    }
    assert all(len(rank) == 3 for rank in ({args[0] for _, args in calls[what]} for what in ("exchange", "join")))


@pytest.mark.usefixtures("made_up_links")
def test_gpus_alone_send_no_messages():
    """Where there is no CPU worker the processes need not meet."""
    devices = [Device(name=f"cuda:{i}", kind="cuda", description="", memory_bytes=1) for i in range(3)]
    pool = PoolOfOne()
    links = measure_links(pool, devices)
    assert len(links) == 6
    assert all(link.bandwidth_bytes_per_s == pytest.approx(1e10) for link in links)
    assert {function for _, function, _ in pool.calls} == {
        "copy_within",
        "copies_for",
        "check_copies",
        "has_peer_access",
    }


def test_corrupt_links_are_warned_of():
    """One line a corrupt link, with both numbers, and none for the others."""
    link = Link(source="cuda:0", target="cuda:1", latency_s=0, bandwidth_bytes_per_s=1, probed_bytes=99, wrong_bytes=7)
    with pytest.warns(UserWarning, match="cuda:0 -> cuda:1 changed 7 of 99 bytes") as caught:
        warn_of_corrupt([link.model_copy(update={"wrong_bytes": 0}), link])
    assert len(caught) == 1


def test_the_disk_is_timed(tmp_path):
    """Reading a file that is not in memory has a rate, and leaves nothing behind."""
    rate = disk_rate(tmp_path)
    assert rate is None or rate > 0
    assert list(tmp_path.iterdir()) == []
