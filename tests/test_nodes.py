"""Several nodes: which process is which device, over which interface, and two of them with torchrun on each."""

import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

import shardwright as sw
from shardwright.profiler.formats.costs import Costs
from shardwright.profiler.workers.pool import loopback_interface
from shardwright.sharder.planning.planner import plan as planned
from shardwright.sharder.runtime import nodes
from shardwright.sharder.runtime.nodes import choose_interface, device_order, interface_towards, place_of

ROOT = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for addresses")


@pytest.fixture(scope="module")
def a_plan():
    return planned(Costs.load(ROOT / "examples" / "costs.json").profile())


def over(a_plan, devices, hosts):
    """``a_plan`` with a stage on each of ``devices``, of which ``hosts`` says the nodes, all in the file's order."""
    stages = tuple(a_plan.stages[0].model_copy(update={"index": i, "device": d}) for i, d in enumerate(devices))
    return a_plan.model_copy(update={"stages": stages, "hosts": hosts, "profiled_devices": tuple(hosts) or devices})


def launched(*counts):
    """What torchrun tells each rank, with so many processes on each node."""
    size = sum(counts)
    local = [(index, count) for count in counts for index in range(count)]
    return [
        {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(index), "LOCAL_WORLD_SIZE": str(count)}
        for rank, (index, count) in enumerate(local)
    ]


def test_kinds_of_devices_on_unnamed_nodes_are_refused(a_plan):
    """On one node a device is its name; on several the local rank does not tell which GPU is meant."""
    plan = over(a_plan, ("cpu:0", "cuda:0"), {})
    assert [place_of(plan, rank, environment).device for rank, environment in enumerate(launched(2))] == [
        "cpu:0",
        "cuda:0",
    ]
    with pytest.raises(sw.ShardwrightError, match=r"mixes kinds of devices \(cpu:0, cuda:0\).*cluster file"):
        place_of(plan, 1, launched(1, 1)[1])


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
def test_ranks_are_counted_node_by_node(a_plan, on):
    """Every device is of one rank; each node's are together, in the plan's order; torchrun's counts are accepted."""
    devices = tuple(f"cuda:{i}" for i in range(len(on)))
    plan = over(a_plan, devices, dict(zip(devices, on, strict=True)))
    order = device_order(plan)
    assert sorted(order) == list(range(len(on)))
    reached = list(dict.fromkeys(on))
    assert [on[position] for position in order] == [host for host in reached for _ in range(on.count(host))]
    counts = [on.count(host) for host in reached]
    for rank, environment in enumerate(launched(*counts)):
        place = place_of(plan, rank, environment)
        assert place.position == order[rank]
        if len(reached) > 1:
            assert place.device == f"cuda:{environment['LOCAL_RANK']}"
            assert len(place.beside) == int(environment["LOCAL_WORLD_SIZE"])
        else:
            assert place.device == devices[order[rank]]


HOSTS = {"cuda:0": "a", "cuda:1": "a", "cpu:0": "b", "cuda:2": "b", "cuda:3": "b"}


@pytest.mark.parametrize(
    ("devices", "counts", "expected"),
    [
        (("cuda:1", "cuda:3", "cuda:0"), (2, 1), [(0, "cuda:1"), (2, "cuda:0"), (1, "cuda:1")]),
        (("cuda:0", "cpu:0"), (1, 1), [(0, "cuda:0"), (1, "cpu:0")]),
        (("cuda:2", "cuda:3"), (2,), [(0, "cuda:0"), (1, "cuda:1")]),  # the second node alone
        (
            ("cuda:1", "cuda:2"),
            (2,),
            [(0, "cuda:1"), (1, "cuda:2")],
        ),  # two nodes tried on one machine, as they are called
    ],
)
def test_a_gpu_has_its_nodes_own_number(a_plan, devices, counts, expected):
    """Cluster files number the GPUs of all nodes; a process counts those of its own."""
    plan = over(a_plan, devices, HOSTS)
    found = [place_of(plan, rank, environment) for rank, environment in enumerate(launched(*counts))]
    assert [(place.position, place.device) for place in found] == expected


def test_without_nodes_in_the_plan_torchrun_says_where_a_process_is(a_plan):
    """A plan that was measured on one machine with four GPUs may run on two machines with two; others stay as named."""
    plan = over(a_plan, ("cuda:0", "cuda:1", "cuda:2", "cuda:3"), {})
    assert [place_of(plan, r, e).device for r, e in enumerate(launched(2, 2))] == ["cuda:0", "cuda:1"] * 2
    assert [place_of(plan, r, e).device for r, e in enumerate(launched(4))] == list(plan.devices)
    assert [place_of(plan, rank, {}).device for rank in range(4)] == list(plan.devices)


def test_a_launcher_that_tells_no_node_size_leaves_the_plans_devices_as_named(a_plan):
    """One node's ranks count as its own processes do; those of a second node begin anew, and take its first GPUs."""
    plan = over(a_plan, ("cuda:1", "cuda:0"), {})
    assert [place_of(plan, rank, {"LOCAL_RANK": str(rank)}).device for rank in range(2)] == ["cuda:1", "cuda:0"]
    four = over(a_plan, ("cuda:0", "cuda:1", "cuda:2", "cuda:3"), {})
    places = [place_of(four, rank, {"LOCAL_RANK": str(rank % 2)}) for rank in range(4)]
    assert [place.device for place in places] == ["cuda:0", "cuda:1"] * 2


@pytest.mark.parametrize("counts", [(1, 2), (3,), (1, 1, 1)])
def test_a_node_has_as_many_processes_as_devices(a_plan, counts):
    """Else the ranks after it are other devices than were planned: both numbers, and what to set on each node."""
    plan = over(a_plan, ("cuda:0", "cuda:1", "cuda:2"), HOSTS)
    errors = []
    for rank, environment in enumerate(launched(*counts)):
        try:
            place_of(plan, rank, environment)
        except sw.ShardwrightError as error:
            errors.append(str(error))
    if counts == (3,):
        assert errors == []
        return
    assert errors[0].startswith("the plan has 2 devices on node 'a' (cuda:0, cuda:1), and torchrun started 1 processes")
    assert errors[0].endswith("set --nproc-per-node to 2 on node 'a' (--node-rank 0), 1 on node 'b' (--node-rank 1)")


@LINUX
def test_a_name_of_loopback_is_no_way_to_other_nodes(monkeypatch):
    """Debian gives a machine's own name to loopback: said on that machine; an address of loopback itself is meant."""
    monkeypatch.setattr(nodes, "interface_towards", lambda _address: loopback_interface())
    several = launched(1, 1)[0]
    with pytest.raises(sw.ShardwrightError, match="node7 is a name of loopback on"):
        choose_interface({**several, "MASTER_ADDR": "node7"})
    for environment in ({**several, "MASTER_ADDR": "127.0.0.2"}, {**launched(2)[0], "MASTER_ADDR": "node7"}):
        choose_interface(environment)
        assert environment["GLOO_SOCKET_IFNAME"] == loopback_interface()


@LINUX
def test_the_interface_is_that_of_the_master():
    """Loopback for what is here; the name of what cannot be looked up is left to gloo; a user's choice stands."""
    assert interface_towards("127.0.0.1") == interface_towards("localhost") == loopback_interface()
    assert interface_towards("no.such.host.invalid") is None
    for given_, expected in (({}, None), ({"MASTER_ADDR": "127.0.0.1"}, "lo"), ({"GLOO_SOCKET_IFNAME": "lo"}, "lo")):
        environment = dict(given_)
        choose_interface(environment)
        assert environment.get("GLOO_SOCKET_IFNAME") == expected


@LINUX
def test_an_interface_is_known_by_its_address():
    """Of those that are there, loopback alone has loopback's; the tests of two nodes ask for others."""
    here = ipaddress.ip_address("127.0.0.1")
    assert [name for _, name in socket.if_nameindex() if nodes._has(name, here)] == [loopback_interface()]


def test_an_interface_that_is_not_there_is_named():
    """Before the ranks connect, and with those that are there."""
    with pytest.raises(sw.ShardwrightError, match=r"GLOO_SOCKET_IFNAME names wire7, and the interfaces of .* are .*lo"):
        choose_interface({"GLOO_SOCKET_IFNAME": "wire7"})


SCRIPT = """
import os, signal, sys, time
import torch
from torch import nn
from torch.nn import functional as F
import shardwright as sw

class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)])

    def forward(self, x):
        return self.layers(x)

if __name__ == "__main__":
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(8, 6)
    pipe = sw.pipeline(model, sw.Plan.load("plan.json"), (x,), loss=F.mse_loss)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.01)
    for step in range(4):
        if step == 2 and sys.argv[1:] == [str(pipe.stage)]:
            open("killed", "w").write(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        loss = pipe.step(x, target=x)
        optimizer.step()
        optimizer.zero_grad()
        print("step", step, float(loss), "stage", pipe.stage, os.environ["RANK"], flush=True)
    pipe.close()
"""
WIRED = ("unshare", "--user", "--map-root-user", "--net", "bash", str(ROOT / "tests" / "nodes.sh"))
NO_NAMESPACES = 77
"""What the script ends with where the second node cannot be made."""


@pytest.fixture
def folder(captured_profile, tmp_path):
    """A script, and a plan over two nodes that goes to the second and comes back."""
    (tmp_path / "train.py").write_text(SCRIPT)
    model, x = unsharded(tmp_path)
    devices = ["cpu:0", "cpu:1", "cpu:2"]
    profile = captured_profile(model, (x,), devices=devices, microbatches=(1, 4), optimizer="adamw")
    on = dict(zip(devices, "aba", strict=True))
    named = tuple(device.model_copy(update={"node": on[device.name]}) for device in profile.devices)
    plan = sw.plan(profile.model_copy(update={"devices": named}), microbatches=4)
    assert plan.devices == ("cpu:0", "cpu:1", "cpu:2")
    assert plan.hosts == on
    plan.save(tmp_path / "plan.json")
    return tmp_path


def unsharded(folder):
    """The script's model and batch."""
    made = {"__name__": "train"}
    exec(compile((folder / "train.py").read_text(), "train.py", "exec"), made)  # it is written above
    torch.manual_seed(0)
    return made["Chain"](), torch.randn(8, 6)


def on_two_nodes(folder, processes, *arguments):
    """Run the script by torchrun on two nodes: each one's exit code and what it printed.

    The nodes are network namespaces with a wire between them, so that each has an address of its own and nothing is
    open to the outside. That takes Linux, but no rights; elsewhere both nodes are on this machine's loopback.
    """
    wired = sys.platform.startswith("linux") and shutil.which("unshare") and shutil.which("ip")
    found = _run(folder, WIRED, _commands("10.7.0.1", 29511, processes, arguments)) if wired else None
    if found is None or found.returncode == NO_NAMESPACES or not found.stdout:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        both = 'bash -c "$2" >node1.log 2>&1 & bash -c "$1" >node0.log 2>&1; a=$?; wait $!; echo $a $?'
        found = _run(folder, ("bash", "-c", both, "nodes"), _commands("127.0.0.1", port, processes, arguments))
    codes = [int(code) for code in found.stdout.split()]
    return [(code, (folder / f"node{node}.log").read_text()) for node, code in enumerate(codes)]


def _commands(address, port, processes, arguments):
    """What to start on each node."""
    fixed = f"{sys.executable} -m torch.distributed.run --nnodes 2 --master-addr {address} --master-port {port}"
    given_ = " ".join(["train.py", *map(str, arguments)])
    return [f"{fixed} --node-rank {n} --nproc-per-node {count} {given_}" for n, count in enumerate(processes)]


def _run(folder, how, commands):
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    return subprocess.run(
        [*how, *commands],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(folder):
    """Losses are the unsharded model's on every rank; ranks 0 and 1 are on the first node, stage 1 on the second."""
    model, x = unsharded(folder)
    optimizer, expected = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    seen = {}
    for node, (code, log) in enumerate(on_two_nodes(folder, (2, 1))):
        assert code == 0, log
        for _, step, loss, _, stage, rank in (line.split() for line in log.splitlines() if line.startswith("step ")):
            seen.setdefault((node, rank, stage), {})[int(step)] = float(loss)
    assert set(seen) == {(0, "0", "0"), (0, "1", "2"), (1, "2", "1")}
    for losses in seen.values():
        assert [losses[step] for step in range(4)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "line"),
    [(1, "rank 2 (stage 1 on cpu:1, node 'b') left"), (0, "rank 0 (stage 0 on cpu:0, node 'a') left")],
)
def test_a_rank_that_is_killed_ends_both_nodes(folder, victim, line):
    """In half a minute, though ranks wait ten for a message; the other node names it, also where the store went too."""
    ended = on_two_nodes(folder, (2, 1), victim)
    took_s = time.time() - float((folder / "killed").read_text())
    assert all(code for code, _ in ended)
    _, log = ended[0 if victim else 1]
    assert f"]: shardwright.errors.ShardwrightError: {line} the pipeline: the process has ended" in log, log
    assert took_s < 30


@pytest.mark.slow
def test_a_plan_of_more_devices_than_ranks_is_refused(folder):
    """On both nodes, with both numbers."""
    for code, log in on_two_nodes(folder, (1, 1)):
        assert code
        assert "ShardwrightError: the plan has 3 stages (cpu:0, cpu:1, cpu:2), and there are 2 processes" in log
