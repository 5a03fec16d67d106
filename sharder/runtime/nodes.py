"""Where the processes of a pipeline are when there are several nodes: which is which device, and how they reach others.

``torchrun`` counts ranks node by node. So do we: the devices of a plan, each node's together and the nodes in the order
in which the stages come to them, are those of ranks 0, 1, 2, …. In a plan whose stages go from node to node and do not
come back that is their order in the plan; in others a rank's *position* among the stages is another number:

    stages of the plan   0 on cuda:0 (a)   1 on cuda:2 (b)   2 on cuda:1 (a)
    ranks                0: cuda:0 (a)     1: cuda:1 (a)     2: cuda:2 (b)
    their positions      0                 2                 1
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from shardwright.errors import ShardwrightError
from shardwright.profiler.workers.pool import loopback_interface
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.piping.hosted import has_several_kinds

__all__ = ["Place", "choose_interface", "device_order", "interface_put_back", "interface_towards", "place_of"]

_INTERFACE = "GLOO_SOCKET_IFNAME"
"""gloo reads it whenever a process group is made."""

_ADDRESS_OF = 0x8915
"""SIOCGIFADDR, see netdevice(7)."""
_ANY_PORT = 9


@dataclass(frozen=True)
class Place:
    """A process's device and what it is called on its own node."""

    position: int
    """Of the device among the plan's."""
    device: str
    """As it is called here: ``cuda:0`` for the first GPU of this node, whatever the plan calls it."""
    beside: tuple[str, ...]
    """The devices of the profile that are on this node, by the plan's names."""


def device_order(plan: Plan) -> tuple[int, ...]:
    """The positions of the plan's devices by rank: each node's together."""
    hosts = [plan.hosts.get(device, "") for device in plan.devices]
    reached = list(dict.fromkeys(hosts))
    return tuple(sorted(range(len(hosts)), key=lambda position: reached.index(hosts[position])))


def place_of(plan: Plan, rank: int, environment: Mapping[str, str]) -> Place:
    """The device of ``rank``, by what ``torchrun`` says of the nodes in ``environment``.

    Raises:
        ShardwrightError: a node has more or fewer processes than the plan has devices there, or it cannot be told which
            of a node's devices this is.
    """
    position = device_order(plan)[rank]
    name = plan.devices[position]
    every = plan.profiled_devices or plan.devices
    kind = name.partition(":")[0]
    local = _number(environment, "LOCAL_RANK")
    on_one = len({plan.hosts.get(device, "") for device in plan.devices}) == 1  # which then may have others before it
    # A launcher that says nothing of the node's size may have started all here, where the plan has named the devices.
    alone = local is None or (local == rank and _number(environment, "LOCAL_WORLD_SIZE") is None)
    if (_on_one_node(environment) and not (plan.hosts and on_one)) or (not plan.hosts and alone):
        return Place(position, name, every)
    if not plan.hosts:
        if has_several_kinds(plan.devices):
            raise ShardwrightError(
                f"the plan mixes kinds of devices ({', '.join(plan.devices)}) and does not say on which node each is: "
                "declare the nodes in a cluster file and plan with --cluster, or have torchrun start all on one node"
            )
        return Place(position, f"{kind}:{local}", every)
    _check_counts(plan, rank, environment)
    beside = tuple(device for device in every if plan.hosts[device] == plan.hosts[name])
    alike = [device for device in beside if device.startswith(f"{kind}:")]
    return Place(position, f"{kind}:{alike.index(name)}", beside)


def _on_one_node(environment: Mapping[str, str]) -> bool:
    """Whether ``torchrun`` says that all processes are on this node."""
    size = _number(environment, "LOCAL_WORLD_SIZE")
    return size is not None and size == _number(environment, "WORLD_SIZE")


def _check_counts(plan: Plan, rank: int, environment: Mapping[str, str]) -> None:
    """Refuse a node with another number of processes than of devices, which would shift the ranks of those after it."""
    started, local = _number(environment, "LOCAL_WORLD_SIZE"), _number(environment, "LOCAL_RANK")
    if started is None or local is None:
        return
    first = rank - local
    order = device_order(plan)
    host = plan.hosts[plan.devices[order[first]]]
    planned = [device for device in plan.devices if plan.hosts[device] == host]
    starts_here = first == 0 or plan.hosts[plan.devices[order[first - 1]]] != host
    if started == len(planned) and starts_here:
        return
    nodes = list(dict.fromkeys(plan.hosts[device] for device in plan.devices))
    each = ", ".join(
        f"{sum(plan.hosts[device] == node for device in plan.devices)} on node {node!r} (--node-rank {number})"
        for number, node in enumerate(nodes)
    )
    raise ShardwrightError(
        f"the plan has {len(planned)} devices on node {host!r} ({', '.join(planned)}), and torchrun started {started} "
        f"processes on the node of rank {rank}: set --nproc-per-node to {each}"
    )


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None


def interface_towards(address: str) -> str | None:
    """Name of the network interface over which this machine reaches ``address``; None where it cannot be told.

    gloo by itself takes the address that the machine's own name stands for, which is often that of loopback. No message
    is sent: a datagram socket that is connected has only looked up its route.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as asking:
            asking.connect(where)
            own = ipaddress.ip_address(asking.getsockname()[0].partition("%")[0])
    except OSError:
        return None
    if own.is_loopback:
        return loopback_interface()
    return next((name for _, name in socket.if_nameindex() if _has(name, own)), None)


def _has(interface: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether ``interface`` has ``address``, as Linux says; for IPv4 the first of it."""
    if address.version == 6:
        with suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as lines:
            rows = [line.split() for line in lines]
            return any(row[-1] == interface and int(row[0], 16) == int(address) for row in rows)
        return False
    try:
        import fcntl
    except ImportError:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, suppress(OSError):
        found = fcntl.ioctl(asking.fileno(), _ADDRESS_OF, struct.pack("256s", interface.encode()[:15]))
        return found[20:24] == address.packed
    return False


def choose_interface(environment: MutableMapping[str, str]) -> None:
    """Have gloo talk over the interface that reaches ``MASTER_ADDR``, unless ``GLOO_SOCKET_IFNAME`` names another.

    Raises:
        ShardwrightError: this machine does not have the one that is named, or there are several nodes and here the
            address is that of loopback, as a machine's own name often is.
    """
    address = environment.get("MASTER_ADDR", "")
    if named := environment.get(_INTERFACE, ""):
        here = [name for _, name in socket.if_nameindex()]
        absent = [name for name in named.split(",") if name not in here]
        if absent:
            raise ShardwrightError(
                f"GLOO_SOCKET_IFNAME names {absent[0]}, and the interfaces of {socket.gethostname()} are "
                f"{', '.join(here)}: give one of them there"
            )
    elif address and (found := interface_towards(address)):
        size = _number(environment, "LOCAL_WORLD_SIZE")
        several = size is not None and not _on_one_node(environment)
        if several and found == loopback_interface() and not _is_loopback(address):
            raise ShardwrightError(
                f"{address} is a name of loopback on {socket.gethostname()}, which other nodes cannot reach: give "
                "--master-addr as the address that they use, or name the interface in GLOO_SOCKET_IFNAME"
            )
        environment[_INTERFACE] = found


@contextmanager
def interface_put_back(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Make process groups in this block over the interface that is chosen there; the variable is the script's again.

    What the script makes later, or the processes that it starts, take the interface that they would have taken.
    """
    before = environment.get(_INTERFACE)
    try:
        yield
    finally:
        if before is None:
            environment.pop(_INTERFACE, None)
        else:
            environment[_INTERFACE] = before


def _is_loopback(address: str) -> bool:
    """Whether ``address`` says itself that it is loopback's."""
    with suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"
