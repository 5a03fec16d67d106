"""Profiles for tests (synthetic for planning, captured with made-up times for running), and the command line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import hypothesis
import pytest
from rich.console import Console

from shardwright.profiler.profile import Device, Link, Measurement, Node, Profile, Tensor, TensorSpec

if TYPE_CHECKING:
    from torch import nn

ProfileMaker = Callable[..., Profile]

# Small models are quicker on one thread, and of two processes on two cores each has one core; before PyTorch is there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The threads of a worker that has both cores spin where they wait for each other, while others' work has these cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The same examples in every run; `make test-random` looks at others (--hypothesis-profile=random).
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same")


def _make_profile(
    edges: Mapping[str, Sequence[str]],
    *,
    forward_s: Mapping[str, float] | float = 1.0,
    speed: Mapping[str, float] | None = None,
    microbatches: Sequence[int] = (1, 2, 4),
    train: bool = True,
    memory_bytes: int = 10**9,
    param_bytes: int = 1_000,
    saved_bytes: int = 800,
    tensor_bytes: int = 80,
    overhead_s: float = 0.0,
    colocate: Sequence[Sequence[str]] = (),
    kinds: Mapping[str, str] | None = None,
) -> Profile:
    """A profile of the units in ``edges`` (unit -> what it reads); backward takes twice the forward.

    ``speed`` divides the times by device; times and sizes are of the whole batch; ``overhead_s`` is added to each
    forward. The node ``x`` is the input and ``outputs`` reads what nobody else does.
    """
    speed = speed or {"cpu:0": 1.0, "cpu:1": 1.0}
    read = {name for sources in edges.values() for name in sources}
    wiring = {"x": (), **edges, "outputs": [name for name in edges if name not in read]}
    kinds = {"x": "input", "outputs": "output"} | dict(kinds or {})
    nodes, measurements = [], []
    for name, sources in wiring.items():
        kind = kinds.get(name, "unit")
        runs = kind in ("unit", "glue")
        nodes.append(
            Node(
                name=name,
                kind=kind,
                type="Linear" if kind == "unit" else kind,
                unit=f"net.{name}" if kind == "unit" else "",
                inputs=tuple(sources),
                param_bytes=param_bytes if kind == "unit" else 0,
                grad_bytes=param_bytes if kind == "unit" and train else 0,
                output_bytes={m: tensor_bytes // m for m in microbatches} if runs else {},
                saved_bytes={m: saved_bytes // m for m in microbatches} if runs and train else {},
            )
        )
        whole = forward_s if isinstance(forward_s, float | int) else forward_s.get(name, 0.0)
        measurements += [
            Measurement(
                node=name,
                device=device,
                microbatches=m,
                repeats=3,
                forward_s=whole / factor / m + overhead_s,
                forward_spread_s=0.0,
                backward_s=2 * whole / factor / m if train else 0.0,
                backward_spread_s=0.0,
                update_s=0.0,
            )
            for device, factor in speed.items()
            for m in microbatches
            if runs
        ]
    return Profile(
        model="nets.py:Net",
        structure="0123",
        inputs=(TensorSpec(name="x", dtype="float32", shape=(8, 4)),),
        batch=8,
        train=train,
        optimizer="adam",
        torch_version="2.13.0",
        microbatches=tuple(microbatches),
        devices=tuple(Device(name=d, kind="cpu", description="", memory_bytes=memory_bytes) for d in speed),
        links=tuple(
            Link(source=a, target=b, latency_s=1e-6, bandwidth_bytes_per_s=1e9) for a in speed for b in speed if a != b
        ),
        nodes=tuple(nodes),
        tensors=tuple(
            Tensor(
                name=name,
                producer=name,
                requires_grad=train and kinds.get(name) != "input",
                bytes={m: tensor_bytes // m for m in microbatches},
            )
            for name in wiring
            if name != "outputs"
        ),
        colocate=tuple(tuple(group) for group in colocate),
        measurements=tuple(measurements),
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same random numbers, whichever ran before it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def make_profile() -> ProfileMaker:
    """Builds a synthetic profile from its wiring."""
    return _make_profile


@pytest.fixture
def chain_profile() -> ProfileMaker:
    """Builds a synthetic profile of a chain of ``count`` units, ``u0`` to the last."""

    def make(count: int, **options: object) -> Profile:
        return _make_profile({f"u{i}": [f"u{i - 1}" if i else "x"] for i in range(count)}, **options)  # type: ignore[arg-type]

    return make


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def simulated_devices() -> None:
    """Simulated devices exist before any test's backward: autograd counts devices once.

    With a GPU they would keep autograd from working there; tests/gpu does without them.
    """
    import torch

    if torch.cuda.is_available():
        return
    from shardwright.sharder.runtime.placing.sim import sim_device

    sim_device(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measurements of tests are kept apart from the user's, also by the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDWRIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_workers() -> Iterator[Callable[..., Any]]:
    """Workers are copies of a process that has imported PyTorch; gives what starts those of users."""
    from nursery import Nursery

    from shardwright.profiler.workers import pool

    with pytest.MonkeyPatch.context() as patch:
        users = pool.launch
        nursery = Nursery(users)
        if sys.platform.startswith("linux"):
            patch.setattr(pool, "launch", nursery)
        yield users
        nursery.close()


@pytest.fixture
def new_workers(monkeypatch: pytest.MonkeyPatch, forked_workers: Callable[..., Any]) -> None:
    """Workers begin as users' do: each imports what it needs itself."""
    from shardwright.profiler.workers import pool

    monkeypatch.setattr(pool, "launch", forked_workers)


@pytest.fixture(scope="session")
def containers() -> ModuleType:
    """The module examples/containers.py."""
    from shardwright.profiler.target import load_target

    load_target(f"{ROOT}/examples/containers.py:Net")
    return sys.modules["containers"]


@pytest.fixture
def captured_profile() -> ProfileMaker:
    """Captures a real model and gives its steps made-up times, so that it can be planned without measuring."""

    def make(
        model: nn.Module,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        devices: Sequence[str] = ("cpu:0", "cpu:1"),
        microbatches: Sequence[int] | None = None,
        train: bool = True,
        optimizer: str = "adam",
        refined: bool = False,
        counted: bool = False,
        parted: bool = False,
    ) -> Profile:
        from shardwright.profiler import records
        from shardwright.profiler.capture import captures_of
        from shardwright.profiler.measuring.gpu_kernels import kernels_as_on
        from shardwright.profiler.measuring.optimizers import OptimizerMemory
        from shardwright.profiler.recording import inputs
        from shardwright.profiler.trace import checked_trace
        from shardwright.profiler.units import structure_digest

        kwargs = kwargs or {}
        microbatches = microbatches or inputs.default_counts(inputs.batch_size(args, kwargs))
        found = tuple(
            Device(name=d, kind=d.partition(":")[0], description="", memory_bytes=10**10, cores=(0,)) for d in devices
        )
        weighed = OptimizerMemory(optimizer) if train else None
        with kernels_as_on(found):
            if refined:
                captures, _ = captures_of(model, args, kwargs, microbatches, devices=len(devices), train=train)
            else:
                pieces = {m: inputs.microbatch(args, kwargs, m) for m in microbatches}
                captures = {m: checked_trace(model, *piece, train=train) for m, piece in pieces.items()}
            peaks = (
                {m: records.count_steps(it, train=train, parted=parted) for m, it in captures.items()}
                if counted
                else None
            )
        steps = [step for step in captures[1].steps if step.kind in ("unit", "glue")]
        return Profile(
            model=type(model).__name__,
            structure=structure_digest(model),
            inputs=inputs.input_specs(args, kwargs),
            batch=inputs.batch_size(args, kwargs),
            train=train,
            optimizer=optimizer if train else "none",
            torch_version="2.13.0",
            microbatches=tuple(microbatches),
            devices=found,
            links=tuple(
                Link(source=a, target=b, latency_s=1e-6, bandwidth_bytes_per_s=1e12)
                for a in devices
                for b in devices
                if a != b
            ),
            nodes=records.nodes_of(captures, weighed, peaks),
            tensors=records.tensors_of(captures),
            colocate=tuple(captures[1].colocate),
            ties=records.ties_of(captures[1], weighed),
            obstacles=tuple(captures[1].obstacles),
            guards=tuple(captures[1].guards),
            measurements=tuple(
                Measurement(
                    node=step.name,
                    device=device,
                    microbatches=m,
                    repeats=1,
                    forward_s=(0.1 if step.kind == "unit" else 1e-4) / m,
                    forward_spread_s=0.0,
                    backward_s=(0.2 if step.kind == "unit" else 1e-4) / m if train else 0.0,
                    backward_spread_s=0.0,
                    backward_input_s=(0.1 if step.kind == "unit" else 1e-4) / m if parted else None,
                    backward_weight_s=(0.1 if step.kind == "unit" else 0.0) / m if parted else None,
                    update_s=0.0,
                )
                for step in steps
                for device in devices
                for m in microbatches
            ),
        )

    return make


class CommandLine:
    """Runs cli.py as a user does: ``python cli.py ARGUMENTS`` in a folder, 100 columns wide."""

    ENVIRONMENT: ClassVar[dict[str, str]] = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}

    def __call__(
        self, *arguments: str, cwd: Path = ROOT, timeout: float = 60, in_process: bool = False
    ) -> subprocess.CompletedProcess[str]:
        if in_process:
            return self.in_this_process(arguments, cwd)
        return self.python(str(ROOT / "cli.py"), *arguments, cwd=cwd, timeout=timeout)

    def python(self, *arguments: str, cwd: Path = ROOT, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run Python on ``arguments``."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | self.ENVIRONMENT,
        )

    def in_this_process(self, arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run ``main`` here: quicker by the import of torch, for mistakes that start no worker."""
        from shardwright import cli

        out, err = io.StringIO(), io.StringIO()
        before = Path.cwd(), cli.out, cli.err
        code: Any = 0
        try:
            os.chdir(cwd)
            cli.out, cli.err = Console(file=out, width=100), Console(file=err, width=100)
            cli.main(list(arguments))
        except SystemExit as leaving:
            code = leaving.code or 0
        finally:
            os.chdir(before[0])
            cli.out, cli.err = before[1:]
        return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def run_cli() -> CommandLine:
    """Runs the command line."""
    return CommandLine()
