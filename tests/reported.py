"""What the tests of reports share: profiles, plans and runs made by hand, and the text of a report."""

import dataclasses
import functools
import io
from pathlib import Path

from rich.console import Console

from shardwright.profiler.formats.costs import Costs
from shardwright.profiler.profile import Device, Estimate, Link, Measurement, Node, Profile, TensorSpec
from shardwright.reports.plan_report import PlanReport
from shardwright.reports.profile_report import ProfileReport
from shardwright.reports.run_report import RunReport
from shardwright.sharder.planning.plan import Candidate, Certificate, Placement, Plan, Prediction, Stage
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.schedules.foreseen import costs_of, timeline_of
from shardwright.sharder.runtime.accounts import Mark, Noted, accounts_of, predicted_slots
from shardwright.sharder.runtime.record import Equality, Naive, Run, Timed

GOLDEN = Path(__file__).parent / "golden"
KIB, MIB, GIB = 2**10, 2**20, 2**30

# unit or glue, type, parameter bytes, saved bytes, output bytes, forward and backward of the whole batch in seconds
NETDICT = [
    ("net1.block11", "Block1", 1_536, 14 * MIB, 5 * MIB, 0.0061, 0.0083),
    ("net1.block21", "Block2", 38_784, 19 * MIB, 5 * MIB, 0.0192, 0.0411),
    ("net1.downsample11", "ConvLRelu", 36_992, 3 * MIB, 1 * MIB, 0.0034, 0.0072),
    ("net1.downsample21", "ConvLRelu", 36_992, 3 * MIB, 1 * MIB, 0.0039, 0.0081),
    ("net1.block12", "Block2", 229_888, 7 * MIB, 2 * MIB, 0.0123, 0.0271),
    ("net1.block22", "Block2", 229_888, 7 * MIB, 2 * MIB, 0.0124, 0.0268),
    ("net1.downsample12", "ConvLRelu", 147_712, 1 * MIB, 590 * KIB, 0.0021, 0.0048),
    ("net1.downsample22", "ConvLRelu", 147_712, 1 * MIB, 590 * KIB, 0.0026, 0.0052),
    ("net1.block13", "ConvLRelu", 295_424, 2 * MIB, 1 * MIB, 0.0041, 0.0089),
    ("net1.block23", "Block2", 918_784, 4 * MIB, 1 * MIB, 0.0137, 0.0297),
    ("cat", "cat", 0, 0, 1 * MIB, 0.00031, 0.00042),
    ("net2.block_r1", "Block1", 656_384, 4 * MIB, 1 * MIB, 0.0098, 0.0201),
    ("add", "add", 0, 0, 1 * MIB, 0.000041, 0.0),
    ("add_1", "add", 0, 0, 1 * MIB, 0.000044, 0.0),
    ("net2.deconv1", "DeConvLRelu", 262_656, 9 * MIB, 4 * MIB, 0.0073, 0.0142),
    ("net2.block_r2", "Block1", 328_192, 9 * MIB, 2 * MIB, 0.0211, 0.0446),
    ("net2.deconv2", "DeConvLRelu", 65_792, 18 * MIB, 9 * MIB, 0.0094, 0.0183),
    ("net2.clr", "ConvLRelu", 73_856, 9 * MIB, 5 * MIB, 0.0312, 0.0664),
]
LLAMA = [
    (f"model.decoder.layers.{layer}.{part}", kind, 200 * MIB, 0, 64 * MIB, 0.0123, 0.0)
    for layer in range(3)
    for part, kind in [("self_attention", "LlamaAttention"), ("feed_forward_network", "LlamaMLP")]
]


def a_profile(rows=NETDICT, devices=("cpu:0", "cpu:1"), train=True, microbatches=(1, 2, 4, 8)):
    """A profile of ``rows``, in which smaller micro-batches compute less efficiently and each device is 4 % slower."""
    nodes = [
        Node(
            name=name.replace(".", "_"),
            kind="unit" if size else "glue",
            type=type_,
            unit=name if size else "",
            param_bytes=size,
            grad_bytes=size * train,
            optimizer_bytes=2 * size * train,
            output_bytes={m: output // m for m in microbatches},
            saved_bytes={m: saved // m for m in microbatches},
        )
        for name, type_, size, saved, output, _, _ in rows
    ]
    measurements = []
    for at, device in enumerate(devices):
        for (name, _, size, _, _, forward, backward), m in ((row, m) for row in rows for m in microbatches):
            slower = (1 + 0.04 * at) * (1 + 0.01 * (m - 1)) / m
            times = {"forward_s": forward * slower, "backward_s": backward * slower * train}
            spreads = {"forward_spread_s": forward * slower * 0.04, "backward_spread_s": backward * slower * 0.02}
            where = {"node": name.replace(".", "_"), "device": device, "microbatches": m, "repeats": 7}
            measurements.append(Measurement(**where, **times, **spreads, update_s=size * 1e-9 * train))
    cpu = devices[0].startswith("cpu")
    return Profile(
        model="examples/containers.py:NetDict",
        structure="sha256:0",
        inputs=(TensorSpec(name="inputs", dtype="float32", shape=(16, 1, 48, 48)),),
        batch=16,
        train=train,
        optimizer="adam",
        torch_version="2.13.0",
        microbatches=microbatches,
        devices=tuple(
            Device(
                name=device,
                kind="cpu" if cpu else "cuda",
                description="AMD EPYC 9B14" if cpu else "NVIDIA H100 80GB HBM3",
                memory_bytes=(10 if cpu else 80) * GIB,
                cores=(at,) if cpu else (),
            )
            for at, device in enumerate(devices)
        ),
        links=tuple(
            Link(
                source=a,
                target=b,
                latency_s=85e-6,
                bandwidth_bytes_per_s=3.2e9,
                busy_latency_s=97e-6,
                busy_bandwidth_bytes_per_s=1.6e9,
                peer=None if cpu else True,
                probed_bytes=6_361_103,
            )
            for a in devices
            for b in devices
            if a != b
        ),
        nodes=tuple(nodes),
        tensors=(),
        measurements=tuple(measurements),
    )


def a_cluster_profile():
    """A profile of an H100 that was measured, one that takes its times, and two whose times are estimated."""
    profile = a_profile(LLAMA, [f"cuda:{i}" for i in range(4)], False, (2, 4))
    sources = {"cuda:1": "scaled", "cuda:2": "estimated", "cuda:3": "estimated"}
    counted = {"compute_efficiency": 0.6, "memory_efficiency": 0.75, "operation_s": 6e-6}
    return profile.model_copy(
        update={
            "devices": tuple(
                d.model_copy(update={"declared": d.name in sources, "node": "a"}) for d in profile.devices
            ),
            "measurements": tuple(
                m.model_copy(update={"source": sources.get(m.device, "measured")}) for m in profile.measurements
            ),
            "links": tuple(link.model_copy(update={"origin": "estimated"}) for link in profile.links),
            "estimates": tuple(Estimate(device=name, **counted) for name in ("cuda:2", "cuda:3")),
        }
    )


def a_plan(speedup=1.53, stages=2, devices=("cpu:0", "cpu:1"), baseline="cpu:0", exact=True):
    """NetDict on ``stages`` devices: the stream of block11 and its kin on the first, the rest on the last."""
    first = {"net1.block11", "net1.downsample11", "net1.block12", "net1.downsample12", "net1.block13", "net1.block21"}
    stage_of = {row[0]: 0 if stages == 1 or row[0] in first else 1 for row in NETDICT}
    step = 0.507 / speedup if stages > 1 else 0.507
    loads = [0.93 * step, 0.88 * step] if stages > 1 else [step]
    return Plan(
        model="examples/containers.py:NetDict",
        structure="sha256:0",
        inputs=(TensorSpec(name="inputs", dtype="float32", shape=(16, 1, 48, 48)),),
        batch=16,
        train=True,
        optimizer="adam",
        objective="throughput",
        transfers="relayed",
        schedule="1f1b",
        microbatches=8 if stages > 1 else 1,
        stages=tuple(
            Stage(
                index=index,
                device=devices[index],
                units=tuple(row[0] for row in NETDICT if row[2] and stage_of[row[0]] == index),
                forward_s=0.0121 + 0.001 * index,
                backward_s=0.0242,
                update_s=0.0011,
                send_forward_s=0.00044 if index + 1 < stages else 0.0,
                receive_backward_s=0.00044 if index + 1 < stages else 0.0,
                load_s=load,
                param_bytes=1_200_000 * (index + 1),
                memory_bytes=(4 * index + 1) * 300 * MIB,
                memory_cap_bytes=10 * GIB,
                in_flight=stages - index,
            )
            for index, load in enumerate(loads)
        ),
        nodes=tuple(
            Placement(
                node=row[0].replace(".", "_"),
                kind="unit" if row[2] else "glue",
                type=row[1],
                unit=row[0] if row[2] else "",
                site="",
                device=devices[stage_of[row[0]]],
                stage=stage_of[row[0]],
                inputs=(),
            )
            for row in NETDICT
        ),
        certificate=Certificate(
            value_s=loads[0],
            bound_s=loads[0] if exact else loads[0] / 1.06,
            gap_percent=0.0 if exact else 6.0,
            exact=exact,
            binds="the work itself: stage 0 on cpu:0 holds an even share of it",
        ),
        predicted=Prediction(
            step_s=step,
            bubble=0.091 if stages > 1 else 0.0,
            baseline_device=baseline,
            baseline_microbatches=1,
            baseline_s=0.507 if baseline else None,
            speedup=0.507 / step if baseline else None,
        ),
        candidates=tuple(
            Candidate(
                microbatches=m,
                stages=2,
                bottleneck_s=loads[0] - 0.002 * (8 - m),
                gap_percent=0.0,
                step_s=0.507 / s,
                speedup=s if baseline else None,
                chosen=stages > 1 and m == 8,
            )
            for m, s in [(1, 0.55 * speedup), (2, 0.8 * speedup), (4, 0.95 * speedup), (8, speedup)]
        ),
    )


def a_run(measured=0.333, predicted=0.331, baseline=True, difference=3.1e-7):
    """NetDict over two devices, beside one that takes 507 ms a step."""
    return Run(
        model="examples/containers.py:NetDict",
        batch=16,
        train=True,
        devices=("cpu:0", "cpu:1"),
        schedule="1f1b",
        microbatches=8,
        steps=9,
        equality=Equality(outputs=0.0, gradients=difference, tolerance=1e-5, tensors=47),
        sharded=Timed(predicted_s=predicted, measured_s=measured, spread_s=0.012),
        baseline_device="cpu:0" if baseline else None,
        baseline=Timed(predicted_s=0.517, measured_s=0.507, spread_s=0.009) if baseline else None,
    )


def a_run_beside_naive():
    """As :func:`a_run`, with an equal split that was run, in fewer steps, and one that was not."""
    naive = (
        Naive(
            name="equal count",
            devices=("cpu:0", "cpu:1"),
            microbatches=4,
            steps=5,
            timed=Timed(predicted_s=0.402, measured_s=0.411, spread_s=0.02),
        ),
        Naive(
            name="by parameters",
            devices=("cpu:0", "cpu:1"),
            microbatches=8,
            steps=0,
            timed=None,
            why="it is the plan's own split",
        ),
    )
    return a_run().model_copy(update={"naive": naive})


def an_accounted_run():
    """A run of the plan of examples/costs.json whose last stage computes its backward half as slowly again."""
    made = planned()
    costs = list(costs_of(made))
    costs[-1] = dataclasses.replace(costs[-1], backward_s=1.5 * costs[-1].backward_s)
    timeline = timeline_of(made, costs)
    slots = predicted_slots(timeline, costs, serial=True)
    noted = [
        Noted(
            0.0,
            timeline.step_s,
            tuple(Mark(s.what, s.microbatch, s.start_s, s.end_s) for s in slots if s.stage == n),
            (),
        )
        for n in range(len(costs))
    ]
    update = {
        "devices": made.devices,
        "batch": made.batch,
        "sharded": Timed(predicted_s=made.predicted.step_s, measured_s=0.99 * timeline.step_s, spread_s=0.002),
        "baseline": Timed(predicted_s=made.predicted.baseline_s, measured_s=0.5, spread_s=0.004),
        "accounts": accounts_of(made, [noted]),
    }
    return a_run().model_copy(update=update)


def the_costs():
    """The costs in examples/costs.json, which are of no model."""
    return Costs.load(GOLDEN.parents[1] / "examples" / "costs.json").profile()


@functools.cache
def planned(**asked):
    """A plan of the costs by another objective."""
    return plan(the_costs(), **asked)


@functools.cache
@functools.cache
def a_plan_in_replicas():
    """Ten units of NetDict in two pipelines of two of four GPUs: so few that every split is looked at, in no order."""
    return plan(a_profile(NETDICT[:10], [f"cuda:{i}" for i in range(4)]), microbatches=8, replicas=2)


REPORTS = {
    "profile": lambda: ProfileReport(a_profile()),
    "profile-inference": lambda: ProfileReport(a_profile(LLAMA, [f"cuda:{i}" for i in range(4)], False, (2, 4))),
    "profile-costs": lambda: ProfileReport(the_costs()),
    "profile-cluster": lambda: ProfileReport(a_cluster_profile()),
    "plan": lambda: PlanReport(a_plan()),
    "plan-one-device": lambda: PlanReport(a_plan(stages=1, speedup=0.97)),
    "plan-too-large": lambda: PlanReport(a_plan(baseline=None, exact=False)),
    "plan-costs": lambda: PlanReport(plan(the_costs())),
    "plan-free": lambda: PlanReport(planned(contiguous=False)),
    "plan-latency": lambda: PlanReport(planned(objective="latency")),
    "plan-memory": lambda: PlanReport(planned(objective="memory")),
    "plan-interleaved": lambda: PlanReport(planned(schedule="interleaved")),
    "plan-replicas": lambda: PlanReport(a_plan_in_replicas()),
    "run": lambda: RunReport(a_run()),
    "run-slower": lambda: RunReport(a_run(measured=0.61)),
    "run-naive": lambda: RunReport(a_run_beside_naive()),
    "run-accounts": lambda: RunReport(an_accounted_run()),
}


def text_of(report, width, encoding="utf-8", colour=None):
    """What a console of ``width`` would show."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, color_system=colour, force_terminal=bool(colour), legacy_windows=False)
    console.print(report)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)
