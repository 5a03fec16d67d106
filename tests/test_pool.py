"""Workers: pinned, always reaped, and clear about how they ended."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextvars import ContextVar
from types import MappingProxyType

import pytest
import torch
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Device
from shardwright.profiler.workers import pool as pool_module
from shardwright.profiler.workers.pool import Pool, Worker, WorkerError
from shardwright.profiler.workers.worker import report

pytestmark = pytest.mark.usefixtures("new_workers")


def device(index=0):
    cores = sorted(os.sched_getaffinity(0))
    return Device(name=f"cpu:{index}", kind="cpu", description="", memory_bytes=1, cores=(cores[index % len(cores)],))


def square(x):
    return x * x


def fail():
    raise ValueError("two\nlines")


def spread(model, x):
    return model(x), [name for name, _ in model.named_parameters()]


class Softened(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return torch.tanh(weight)


def test_parametrized_modules_are_sent():
    """Weight norm, spectral norm and ones of the user's, several of a module and one behind another."""
    own = nn.Linear(4, 4)
    for name in ("weight", "bias", "weight"):
        nn.utils.parametrize.register_parametrization(own, name, Softened())
    norm = nn.utils.parametrizations
    model = nn.Sequential(norm.weight_norm(nn.Linear(3, 4)), own, norm.spectral_norm(nn.Linear(4, 2)), own).eval()
    model = model[:3]
    x = torch.ones(2, 3)
    with Pool([device()]) as pool:
        output, names = pool.call({"cpu:0": (spread, (model, x))}, limit_s=60)["cpu:0"]
        twice = pool.call({"cpu:0": (spread, (nn.Sequential(own, own), torch.ones(1, 4)))}, limit_s=60)["cpu:0"]
    assert torch.equal(output, model(x))
    assert names == [name for name, _ in model.named_parameters()]
    assert len(twice[1]) == len([*own.parameters()])  # it is one module there too
    assert type(own).__name__ == "ParametrizedLinear"


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def stop_self():
    os.kill(os.getpid(), signal.SIGSTOP)


def exit_with_a_word():
    print("the last word", flush=True)
    os._exit(3)


def wait(seconds):
    time.sleep(seconds)


def count(n):
    for i in range(n):
        report(i)
    return n


def where_am_i():
    return os.getpid(), sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_calls_run_in_pinned_processes():
    """Each device is a process of its own on its own cores; the pool leaves none behind."""
    with Pool([device(0), device(1)]) as pool:
        found = pool.call({"cpu:0": (where_am_i, ()), "cpu:1": (where_am_i, ())}, limit_s=60)
    pids = {name: pid for name, (pid, _, _) in found.items()}
    assert len({*pids.values(), os.getpid()}) == 3
    assert [cores for _, cores, _ in found.values()] == [list(device(i).cores) for i in range(2)]
    assert all(threads == "1" for _, _, threads in found.values())
    assert not any(is_running(pid) for pid in pids.values())


def imports(folder, names):
    """Import modules one after another, each of which takes a while."""
    sys.path.insert(0, folder)
    for name in names:
        __import__(name)
    return len(names)


def waits_for(file):
    """Do nothing but live until there is ``file``."""
    while not os.path.exists(file):
        time.sleep(0.1)


class Slow:
    """A part of a call that takes a while to unpack."""

    def __init__(self, size):
        self.data = bytes(size)

    def __reduce__(self):
        return unpacked, (self.data,)


def unpacked(data):
    time.sleep(0.4)
    return data


@pytest.mark.parametrize("loading", [True, False])
def test_a_worker_that_loads_is_not_hung(tmp_path, loading):
    """Modules and bytes that come in are progress where they are counted; the limit is less than all of them take."""
    limit_s = 2
    names = [f"slowly{number}" for number in range(6)]
    for name in names:
        (tmp_path / f"{name}.py").write_text("import time; time.sleep(0.5)")
    with Pool([device()]) as pool:
        pool.call({"cpu:0": (square, (2,))}, limit_s=60)
        calls = {"cpu:0": (imports, (str(tmp_path), names))}
        if not loading:
            with pytest.raises(WorkerError, match="worker cpu:0 did not answer within 2 s"):
                pool.call(calls, limit_s=limit_s)
            return
        assert pool.call(calls, limit_s=limit_s, loading=True) == {"cpu:0": 6}
        parts = [Slow((1 << 17) + number) for number in range(8)]
        assert pool.call({"cpu:0": (lambda *parts: len(parts), tuple(parts))}, limit_s=limit_s, loading=True) == {
            "cpu:0": 8
        }


def test_a_worker_that_only_lives_is_hung():
    """Its heart beats, and nothing comes in; nor does a loop count as progress."""
    for stuck in (waits_for, turns_until):
        with Pool([device()]) as pool:
            pool.call({"cpu:0": (square, (2,))}, limit_s=60)
            with pytest.raises(WorkerError, match="worker cpu:0 did not answer within 2 s and was ended"):
                pool.call({"cpu:0": (stuck, ("/nowhere",))}, limit_s=2, loading=True)


def report_and_return(file):
    """Be late, with a number of its own."""
    waits_for(file)
    report("late")
    return "late"


def report_and_fail(file):
    """Be late, and fail then."""
    waits_for(file)
    fail()


def turns_until(file):
    """Compute until there is ``file``."""
    while not os.path.exists(file):
        sum(range(1000))


def test_functions_of_a_script_reach_the_worker():
    """Closures and lambdas travel by value."""
    offset = 5
    with Pool([device()]) as pool:
        assert pool.call({"cpu:0": (lambda x: square(x) + offset, (3,))}, limit_s=60) == {"cpu:0": 14}


def test_progress_arrives_in_order():
    """What a call reports is handed to the caller while it runs."""
    heard = []
    with Pool([device()]) as pool:
        pool.call({"cpu:0": (count, (4,))}, limit_s=60, on_progress=lambda name, what: heard.append((name, what)))
    assert heard == [("cpu:0", i) for i in range(4)]


def test_an_error_is_one_line_with_its_traceback_kept():
    """A worker's exception names the worker, on one line; the pool can be used on."""
    with Pool([device()]) as pool:
        with pytest.raises(WorkerError, match="worker cpu:0 failed: ValueError: two lines") as caught:
            pool.call({"cpu:0": (fail, ())}, limit_s=60)
        assert "in fail" in caught.value.detail
        assert pool.call({"cpu:0": (square, (2,))}, limit_s=60) == {"cpu:0": 4}


@pytest.mark.parametrize("late", [report_and_return, report_and_fail])
def test_what_comes_too_late_is_nobodys_answer(monkeypatch, tmp_path, late):
    """One failed, the other was no longer waited for: what it says later is not taken for the next call's."""
    monkeypatch.setattr(pool_module, "SETTLE_S", 0.0)
    heard = []
    with Pool([device(0), device(1)]) as pool:
        pool.call(dict.fromkeys(("cpu:0", "cpu:1"), (square, (1,))), limit_s=60)
        with pytest.raises(WorkerError, match="worker cpu:1 failed"):
            pool.call({"cpu:0": (late, (str(tmp_path / "go"),)), "cpu:1": (fail, ())}, limit_s=60)
        (tmp_path / "go").touch()
        calls = {"cpu:0": (square, (3,)), "cpu:1": (square, (4,))}
        assert pool.call(calls, limit_s=60, on_progress=lambda *what: heard.append(what)) == {"cpu:0": 9, "cpu:1": 16}
    assert heard == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (kill_self, "was killed by SIGKILL; the system may have run out of memory"),
        (exit_with_a_word, "ended with exit code 3: the last word"),
    ],
)
def test_a_death_is_named(function, message):
    """How a worker ended, and its last words, are told."""
    with pytest.raises(WorkerError, match=message), Pool([device()]) as pool:
        pool.call({"cpu:0": (function, ())}, limit_s=60)


def test_a_death_comes_before_the_errors_that_follow_from_it():
    """When one dies and another fails, the one that died is named."""
    with Pool([device(0), device(1)]) as pool:
        pool.call(dict.fromkeys(("cpu:0", "cpu:1"), (square, (1,))), limit_s=60)
        with pytest.raises(WorkerError, match="worker cpu:1 was killed"):
            pool.call({"cpu:0": (fail, ()), "cpu:1": (kill_self, ())}, limit_s=60)


def test_a_call_that_takes_too_long_is_ended():
    """A worker that does not answer within the limit is ended with everything it started."""
    with Pool([device()]) as pool:
        pid, *_ = pool.call({"cpu:0": (where_am_i, ())}, limit_s=60)["cpu:0"]
        with pytest.raises(WorkerError, match="did not answer within 1 s"):
            pool.call({"cpu:0": (wait, (60,))}, limit_s=1)
    assert not is_running(pid)


def test_a_frozen_worker_is_noticed(monkeypatch):
    """A stopped process sends no heartbeat and is given up long before a call's limit."""
    monkeypatch.setattr(pool_module, "SILENCE_S", 3.0)
    with Pool([device()]) as pool:
        pool.call({"cpu:0": (square, (1,))}, limit_s=60)
        with pytest.raises(WorkerError, match="is frozen: no sign of life"):
            pool.call({"cpu:0": (stop_self, ())}, limit_s=60)


def test_workers_leave_when_their_parent_is_killed(tmp_path):
    """A parent that is killed outright takes its workers with it."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from shardwright.profiler.workers.pool import Pool\n"
        "from shardwright.profiler.profile import Device\n"
        "with Pool([Device(name='cpu:0', kind='cpu', description='', memory_bytes=1)]) as pool:\n"
        "    print(pool.call({'cpu:0': (os.getpid, ())}, limit_s=60)['cpu:0'], flush=True)\n"
        "    pool.call({'cpu:0': (time.sleep, (600,))}, limit_s=600)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)


def test_closing_twice_is_harmless():
    """A worker may be closed again."""
    worker = Worker(device())
    worker.close()
    worker.close()


def test_a_worker_starts_no_workers(monkeypatch):
    """A file that profiles at its top level, imported by a worker, is refused instead of multiplying."""
    monkeypatch.setenv(pool_module.IN_WORKER, "1")
    with pytest.raises(ShardwrightError, match="if __name__ == "):
        Pool([device()])


def test_what_cannot_be_sent_is_said():
    """A lock among the arguments is one clear line."""
    with Pool([device()]) as pool, pytest.raises(ShardwrightError, match="cannot be sent to its worker: TypeError"):
        pool.call({"cpu:0": (square, (threading.Lock(),))}, limit_s=60)


REGISTRY: dict[str, str] = {}


class Registered(nn.Module):
    """Works only where its class was constructed, as models of transformers that record hidden states do."""

    _can_record_outputs = MappingProxyType({"hidden_states": nn.Linear})

    def __init__(self, config):
        super().__init__()
        self.config, self.layer = config, nn.Linear(config["width"], 1)
        REGISTRY[type(self).__name__] = "known"

    def forward(self, x):
        """One more where the class is known."""
        return self.layer(x) + len(REGISTRY[type(self).__name__])


class Unlike(Registered):
    """Cannot be constructed from its ``config`` alone."""

    def __init__(self, config, more):
        super().__init__(config)
        self.more = more


class Recorded:
    """What hooks record to."""

    def __init__(self):
        self.context = ContextVar("recorded", default=0)


RECORDED = Recorded()


def counted_by_a_hook(module, x):
    """How often a hook was called, by the module's own variable."""
    RECORDED.context.set(0)
    module(x)
    return RECORDED.context.get()


def test_a_hook_finds_the_context_variable_of_its_module():
    """It is the worker's own, as the module that is imported there has it."""
    module = nn.Linear(2, 2)
    recorded = RECORDED

    def hook(*_):
        recorded.context.set(recorded.context.get() + 1)

    module.register_forward_hook(hook)
    with Pool([device()]) as pool:
        assert pool.call({"cpu:0": (counted_by_a_hook, (module, torch.ones(1, 2)))}, limit_s=60) == {"cpu:0": 1}


def called(module, x):
    before = torch.get_rng_state()
    return module(x), torch.equal(before, torch.get_rng_state()), sorted(REGISTRY)


def test_a_class_is_known_to_the_process_that_its_instance_comes_to():
    """A worker constructs one of it first, which takes no storage and no random numbers, and tells no other class."""
    module, x = nn.Sequential(Registered({"width": 3})), torch.randn(2, 3)
    with Pool([device()]) as pool:
        [(found, steady, known)] = pool.call({"cpu:0": (called, (module, x))}, limit_s=60).values()
        assert torch.equal(found, module(x))
        assert steady
        assert known == ["Registered"]
        with pytest.raises(WorkerError, match="KeyError: 'Unlike'"):
            pool.call({"cpu:0": (called, (Unlike({"width": 3}, 1), x))}, limit_s=60)


class Odd(nn.Module):
    """What is pickled by its name."""

    _can_record_outputs = Registered._can_record_outputs
    config = MappingProxyType({})

    def __reduce_ex__(self, _):
        return "ODD"


ODD = Odd()


class Changing(Registered):
    """Its constructor changes the configuration."""

    def __init__(self, config):
        super().__init__(config)
        config["width"] = None
        random.random()


def width_and_number(module):
    return module.config["width"], random.random()


def seeded(seed):
    random.seed(seed)


def test_a_class_is_made_known_without_a_trace():
    """The configuration arrives as it was, random numbers stay, and what goes by its name does so."""
    module = Changing({"width": 3})
    module.config["width"] = 5
    with Pool([device()]) as pool:
        pool.call({"cpu:0": (seeded, (1,))}, limit_s=60)
        found = pool.call({"cpu:0": (width_and_number, (module,))}, limit_s=60)["cpu:0"]
        assert found == (5, random.Random(1).random())
        assert pool.call({"cpu:0": (type, (ODD,))}, limit_s=60) == {"cpu:0": Odd}


def test_a_context_variable_of_a_script_cannot_be_sent(monkeypatch):
    """A worker does not import the script."""
    monkeypatch.setattr(Recorded, "__module__", "__main__")
    with Pool([device()]) as pool, pytest.raises(ShardwrightError, match=r"cannot be sent .*ContextVar.*; remove") as e:
        pool.call({"cpu:0": (len, ([RECORDED],))}, limit_s=60)
    assert "\n" not in str(e.value)
