"""What the reports say, held by literal tables, by widths, and by golden files of the whole text.

After a wanted change of the text, renew the golden files and read their difference before committing it:

    SHARDWRIGHT_RENEW_GOLDEN=1 python -m pytest tests/test_reports.py
"""

import dataclasses
import functools
import io
import os
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from shardwright.profiler.costs import Costs
from shardwright.profiler.profile import Device, Estimate, Link, Measurement, Misfit, Node, Profile, TensorSpec
from shardwright.reports.naive_report import beside_naive
from shardwright.reports.plan_report import PlanReport, verdict
from shardwright.reports.profile_report import ProfileReport
from shardwright.reports.run_report import RunReport, conclusion, equality
from shardwright.sharder.planning.foreseen import costs_of, timeline_of
from shardwright.sharder.planning.plan import Alternative, Candidate, Certificate, Placement, Plan, Prediction, Stage
from shardwright.sharder.planning.planner import plan
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
def a_plan_in_replicas():
    """NetDict in two pipelines of two of four GPUs."""
    return plan(a_profile(devices=[f"cuda:{i}" for i in range(4)]), microbatches=8, replicas=2)


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
KEY_NUMBERS = {
    "profile": ["downsample11", "19.2 ms", "41.1 ms", "159 ms", "3.31 MiB", "85.0 us", "3.20 GB/s", "10.0 GiB"],
    "profile-inference": ["feed_forward_network", "cuda:3", "6.21 ms", "200 MiB", "80.0 GiB"],
    "profile-costs": [
        "costs as given, of no model",
        "14.6 ms",
        "22.4 GiB",
        "optimizer state and buffers",
        "50.0 GB/s",
    ],
    "plan-costs": [
        "also in 8 micro-batches",
        "costs as given",
        "one of 8 micro-batches",
        "1.83x",
        "image",
        "stem, body",
    ],
    "plan-free": ["205 ms of a step", "2.38x", "No pipeline engine runs", "to each device that reads"],
    "plan-latency": ["side by side", "46.9 ms", "63.5 ms", "15.8 ms", "every schedule", "longest way"],
    "plan-interleaved": [
        "interleaved 1F1B (2 stages a device)",
        "no better split",
        "interleaved by 2",
        "0, 2",
        "264 ms",
    ],
    "plan-replicas": ["in 2 replicas of 2 stages", "takes 4 of 8", "this mesh of 2 replicas", "cuda:1, cuda:3", "sum"],
    "plan-memory": ["41%", "6.036 GiB of 14.9 GiB", "micro-batches of this size", "no larger peak share"],
    "profile-cluster": ["≈6.46 ms", "~6.71 ms", "~85.0 us", "~3.20 GB/s", "all assumed", "scaled: as a device"],
    "plan": [
        "1.53x",
        "331 ms",
        "507 ms",
        "308 ms",
        "13.1 ms",
        "880 us",
        "0%",
        "9.1%",
        "chosen",
        "downsample22",
        "10.0 GiB",
    ],
    "plan-one-device": ["Do not shard", "507 ms", "0.97x", "cpu:0"],
    "plan-too-large": ["makes it fit", "331 ms", "6.0%"],
    "run": ["47 outputs and gradients", "3.1e-07", "333 ms", "331 ms", "507 ms", "1.52x", "1.56x", "+2.6%"],
    "run-naive": [
        "411 ms",
        "402 ms",
        "1.21x",
        "1.23x",
        "5 steps",
        "by parameters: not run, it is the plan's own split",
    ],
    "run-accounts": ["backward on cuda:1", "14.4 ms", "21.6 ms", "waiting", "transfer", "samples"],
    "run-slower": ["Slower than one device", "0.83x", "610 ms"],
}


def text_of(report, width, encoding="utf-8", colour=None):
    """What a console of ``width`` would show."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, color_system=colour, force_terminal=bool(colour), legacy_windows=False)
    console.print(report)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("name", REPORTS)
def test_fits_every_width(name, width):
    """A report shows its key numbers on any width, and no line is wider than the console."""
    text = text_of(REPORTS[name](), width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    flowing = " ".join(text.split())
    assert [number for number in KEY_NUMBERS[name] if number not in flowing] == []


@pytest.mark.parametrize("name", REPORTS)
def test_needs_neither_colour_nor_unicode(name):
    """Colour adds nothing but colour, and a terminal that has only ASCII gets a report of ASCII."""
    assert "\x1b[" in text_of(REPORTS[name](), 100, colour="standard")
    assert text_of(REPORTS[name](), 100, encoding="ascii").isascii()


@pytest.mark.parametrize(
    "name", ["profile-costs", "plan-costs", "plan-free", "plan-latency", "plan-memory", "plan-interleaved"]
)
def test_costs_are_not_called_measured(name):
    """A report of costs from elsewhere says nothing of samples, spreads, optimizers or torch."""
    text = text_of(REPORTS[name](), 100)
    assert [word for word in ("sample", "median", "spread", "adam", "none,", "torch", "±") if word in text] == []


@pytest.mark.parametrize("name", REPORTS)
def test_golden(name):
    """The whole text at 100 columns is the golden file's."""
    path = GOLDEN / f"{name}.txt"
    text = "\n".join(line.rstrip() for line in text_of(REPORTS[name](), 100).splitlines()) + "\n"
    if os.environ.get("SHARDWRIGHT_RENEW_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("plan", "shard", "text"),
    [
        (a_plan(), True, "Shard this over cpu:0 and cpu:1 with 8 micro-batches: expect 1.53x the speed of cpu:0 alone"),
        (
            a_plan(speedup=1.02),
            False,
            "Do not shard this: over cpu:0 and cpu:1 with 8 micro-batches it runs at only 1.02x",
        ),
        (
            a_plan(stages=1, speedup=0.97),
            False,
            "Do not shard this: keep it on cpu:0, 507 ms a step. The best split, over 2",
        ),
        (
            a_plan(baseline=None),
            True,
            "Shard this over cpu:0 and cpu:1 with 8 micro-batches: no single device holds it",
        ),
    ],
)
def test_verdict(plan, shard, text):
    """The verdict is to shard when that makes the model fit or at least 3 % faster, and not to otherwise."""
    found = verdict(plan)
    assert found.shard is shard
    assert found.text.startswith(text)


@pytest.mark.parametrize(
    ("step_s", "said"),
    [
        (
            0.2,
            "Data parallel over 2 devices, the whole model on each and a part of the batch, would take 200 ms: faster",
        ),
        (0.33, ""),
        (None, ""),
    ],
)
def test_the_verdict_says_when_data_parallel_is_faster(step_s, said):
    """By more than noise; a plan that stands is not questioned."""
    other = Alternative(name="data parallel", microbatches=2, devices=2, step_s=step_s, why="" if step_s else "no")
    text = verdict(a_plan().model_copy(update={"alternatives": (other,)})).text
    assert (said in text) if said else ("Data parallel" not in text)


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (a_run(), "Measured 1.52x over cpu:0 alone; predicted 1.56x (+2.6%)."),
        (a_run(predicted=None), "Measured 1.52x over cpu:0 alone."),
        (
            a_run(measured=0.61),
            "Slower than one device: measured 0.83x the speed of cpu:0 alone; predicted 1.56x (+88%).",
        ),
        (
            a_run(baseline=False),
            "Measured 333 ms a step; predicted 331 ms (-0.6%). "
            "No single device holds the model, so there is no speedup to state.",
        ),
    ],
)
def test_conclusion(run, text):
    """A run ends with the measured speedup beside the predicted one, and says so when it is a loss."""
    assert conclusion(run) == text


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        (0.411, "1.23x over the split by equal count."),
        (0.349, "As fast as the split by equal count, within the noise."),
        (0.300, "The split by equal count was faster: 1.11x the speed of the plan."),
    ],
)
def test_a_plan_is_held_to_the_fastest_naive_split(measured, text):
    """The steps differ by 16 ms or less, half of both interquartile ranges: that is noise."""
    run = a_run_beside_naive()
    timed = run.naive[0].timed.model_copy(update={"measured_s": measured})
    slow = run.naive[0].model_copy(update={"timed": timed.model_copy(update={"measured_s": 2.0})})
    other = run.naive[0].model_copy(update={"timed": timed})
    assert beside_naive(run.model_copy(update={"naive": (slow, other)})) == text
    assert beside_naive(a_run()) == ""


def test_unequal_results_are_said_first():
    """A run whose gradients differ by more than the tolerance is reported as not equal."""
    assert equality(a_run(difference=3e-4)) == (
        False,
        "NOT equal to the unsharded model: 47 outputs and gradients compared "
        "(largest relative difference: outputs 0, gradients 0.0003; tolerance 1e-05).",
    )


def test_second_call_of_a_unit_is_told_apart():
    """A unit that the forward calls twice has a row for each call."""
    profile = a_profile(NETDICT[:2])
    again = profile.nodes[0].model_copy(update={"name": "net1_block11_1", "param_bytes": 0})
    text = text_of(ProfileReport(profile.model_copy(update={"nodes": (*profile.nodes, again)})), 100)
    assert "block11 (call 2)" in text


def test_repeated_blocks_are_one_range():
    """Numbered blocks that lie on one device whole are listed as a range, and one that is cut by its own units."""
    cut_at = "model.decoder.layers.2.feed_forward_network"
    nodes = [
        Placement(
            node=unit,
            kind="unit",
            type=type_,
            unit=unit,
            site="",
            device=f"cuda:{unit == cut_at:d}",
            stage=0,
            inputs=(),
        )
        for layer in range(3)
        for unit, type_, *_ in LLAMA[2 * layer : 2 * layer + 2]
    ]
    text = text_of(PlanReport(a_plan().model_copy(update={"nodes": tuple(nodes)})), 100)
    placement = [line.split() for line in text.partition("Placement")[2].splitlines()[2:]]
    assert placement == [
        ["model.decoder.layers", "cuda:0", "0,", "1"],
        ["model.decoder.layers.2", "cuda:0", "self_attention"],
        ["cuda:1", "feed_forward_network"],
    ]


def test_units_are_shown_as_a_tree():
    """Units stand indented under the modules that hold them, which sum them; a chain of single children is one line."""
    rows = [("net.h.0.attn", "Attention", 4, 0, 0, 0.001, 0.002), ("net.h.0.mlp", "MLP", 8, 0, 0, 0.003, 0.004)]
    rows += [("net.h.1", "Block", 16, 0, 0, 0.001, 0.001), ("head", "Linear", 32, 0, 0, 0.001, 0.001)]
    lines = text_of(ProfileReport(a_profile(rows)), 100).splitlines()
    table = [line.split("B ")[0].rstrip() for line in lines if line.startswith("  ")]
    found = [
        line for line in table if line.split()[:1] and line.split()[0] in ("net.h", "0", "attn", "mlp", "1", "head")
    ]
    found = found[:6]  # the tables after it have rows of numbers too
    assert [(len(line) - len(line.lstrip()), *line.split()[:1]) for line in found] == [
        (2, "net.h"), (4, "0"), (6, "attn"), (6, "mlp"), (4, "1"), (2, "head")
    ]  # fmt: skip
    assert [line.split()[-1] for line in found] == ["28", "12", "4", "8", "16", "32"]


def test_what_stands_against_piping_is_said():
    """Obstacles, guards and ties have a section of their own; the plan's verdict names the first obstacle."""
    obstacle = "net.py:3:8 reads a number back (item) that depends on the inputs' values"
    profile = a_profile(NETDICT[:2]).model_copy(
        update={"obstacles": (obstacle,), "guards": ("all at net.py:9 is True",)}
    )
    text = " ".join(text_of(ProfileReport(profile), 100).split())
    assert f"cannot be piped {obstacle}" in text
    assert "piped while all at net.py:9 is True" in text


def some_links(**changes):
    """Both directions between two GPUs, the second changed."""
    known = {"latency_s": 9e-6, "bandwidth_bytes_per_s": 22e9, "busy_latency_s": 12e-6, "probed_bytes": 6_361_103}
    known |= {"busy_bandwidth_bytes_per_s": 18e9, "peer": True}
    pairs = [("cuda:0", "cuda:1", {}), ("cuda:1", "cuda:0", changes)]
    return tuple(Link(**(known | {"source": a, "target": b} | more)) for a, b, more in pairs)


def links_text(links, width=100):
    return text_of(ProfileReport(a_profile(devices=("cuda:0", "cuda:1")).model_copy(update={"links": links})), width)


@pytest.mark.parametrize("width", [60, 100])
def test_links_are_shown_alone_and_all_at_once(width):
    """Each link has both of its times, the way that it goes, and that its bytes arrive."""
    text = links_text(some_links(peer=False), width).partition("Links")[2]
    assert max(map(cell_len, text.splitlines())) <= width
    for words in ("9.00 us", "22.0 GB/s", "all at once", "12.0 us", "18.0 GB/s", "peer", "staged", "clean"):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"peer": True}, "NCCL_P2P_DISABLE=1"),
        ({"peer": False}, "leave one of the two out"),
        ({"peer": None}, "--devices"),
    ],
)
def test_a_corrupt_link_is_said_in_words(changes, remedy):
    """Below the table: which link, how many bytes of how many, that no plan uses it, and what to do."""
    text = " ".join(links_text(some_links(wrong_bytes=17, **changes)).partition("Links")[2].split())
    assert "cuda:1 → cuda:0 changes what it carries: of 6.07 MiB sent, 17 bytes arrived wrong. No plan uses it." in text
    assert remedy in text
    assert text.count("corrupt") == 1


def test_what_the_engine_takes_is_told_where_it_is_known():
    """Under the links, and nothing where no pipeline was timed."""
    profile = a_profile()
    devices = tuple(device.model_copy(update={"engine_s": 5.5e-4}) for device in profile.devices)
    said = "engine takes 550 us for each forward and each backward of a micro-batch"
    assert said in " ".join(text_of(ProfileReport(profile.model_copy(update={"devices": devices})), 100).split())
    assert "engine" not in text_of(ProfileReport(profile), 100)


def test_links_of_an_older_profile():
    """A profile from before links were checked shows what it has, and claims nothing."""
    plain = {"busy_latency_s": None, "busy_bandwidth_bytes_per_s": None, "peer": None, "probed_bytes": 0}
    text = links_text(tuple(link.model_copy(update=plain) for link in some_links())).partition("Links")[2]
    assert "9.00 us" in text
    assert not any(word in text for word in ("all at once", "clean", "corrupt", "peer"))


def test_a_measured_number_has_no_mark():
    """Estimated and scaled numbers are marked and explained; where all is measured there is neither mark nor legend."""
    measured, cluster = text_of(ProfileReport(a_profile()), 100), text_of(ProfileReport(a_cluster_profile()), 200)
    assert not {"~", "≈"} & set(measured)
    assert "Not measured" not in measured
    assert "Not measured  devices of a cluster file; ≈ scaled, ~ estimated" in cluster
    row = next(line for line in cluster.splitlines() if "LlamaMLP" in line)
    assert [row.count(sign) for sign in ("≈", "~", "±")] == [1, 2, 1]


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        ({}, "60% of the peak arithmetic and 75% of the memory's bandwidth, 6.00 us an operator, all assumed"),
        ({"fitted_to": "cpu:0"}, "bandwidth, assumed; 6.00 us an operator, fitted to cpu:0"),
        (
            {"fitted_to": "cuda:0", "efficiencies_fitted": True, "median_error": 0.08},
            "bandwidth, 6.00 us an operator, fitted to cuda:0 (8.0% off there)",
        ),
    ],
)
def test_what_an_estimate_rests_on(estimate, text):
    """Which figures were fitted to measurements, and which are assumed."""
    profile = a_cluster_profile()
    changed = tuple(e.model_copy(update=estimate) for e in profile.estimates)
    shown = " ".join(text_of(ProfileReport(profile.model_copy(update={"estimates": changed})), 200).split())
    assert text in shown


def test_a_plan_for_declared_devices_says_so():
    """The reader is told that its times are estimates."""
    plan = a_plan().model_copy(update={"declared_devices": ("cpu:1",)})
    assert "Nothing was measured on cpu:1: the times there are estimates." in text_of(PlanReport(plan), 100)


def test_how_sure_the_medians_are_is_told():
    """Weighted by time, with the outliers and what the first calls took beside the others."""
    profile = a_profile()
    rows = [
        m.model_copy(update={"median_error": 0.01, "outliers": 1, "first_call_s": m.forward_s + m.backward_s + 0.002})
        for m in profile.measurements
    ]
    count = sum(m.device == "cpu:0" for m in rows)
    shown = " ".join(text_of(ProfileReport(profile.model_copy(update={"measurements": tuple(rows)})), 160).split())
    assert f"1.0% either way, 7 repeats, {count} outliers, first calls {2 * count:.3g}" in shown
    assert "Measured" not in text_of(ProfileReport(profile), 160)


def test_what_does_not_fit_is_told():
    """Each step, device and reason, the first few of them."""
    profile = a_profile()
    misfits = tuple(
        Misfit(node=profile.nodes[1].name, device="cpu:1", microbatches=n, reason="out of memory") for n in range(1, 9)
    )
    shown = text_of(ProfileReport(profile.model_copy(update={"misfits": misfits})), 160)
    assert f"{profile.nodes[1].name} does not fit on cpu:1 at 2 micro-batches: out of memory" in shown
    assert "and 3 more do not fit" in shown


def test_a_gpu_that_waits_for_its_host_is_named():
    """With the numbers of micro-batches at which it does; nothing is said of the others."""
    profile = REPORTS["profile"]().profile
    device = profile.devices[0].name
    bound = [m.model_copy(update={"host_bound": m.device == device}) for m in profile.measurements]
    shown = " ".join(text_of(ProfileReport(profile.model_copy(update={"measurements": tuple(bound)})), 100).split())
    assert f"{device} waits for its host" in shown
    assert f"{profile.devices[1].name} waits for its host" not in shown
    assert "waits for its host" not in text_of(REPORTS["profile"](), 100)
