"""What the reports say in words: verdicts, conclusions, links, estimates."""

import re

import pytest
from reported import LLAMA, NETDICT, REPORTS, a_cluster_profile, a_plan, a_profile, a_run, a_run_beside_naive, text_of
from rich.cells import cell_len

from shardwright.profiler.profile import Link, Misfit
from shardwright.reports.naive_report import beside_naive
from shardwright.reports.plan_report import PlanReport, verdict
from shardwright.reports.profile_report import ProfileReport
from shardwright.reports.run_report import conclusion, equality
from shardwright.sharder.planning.plan import Alternative, Placement


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
    ("batch", "devices", "said"),
    [
        (16, 2, "faster by 1.66x (--replicas 2)."),
        (16, 3, "faster by 1.66x, with a batch that is a multiple of 3; 16 is not."),
    ],
)
def test_data_parallel_is_advised_with_what_asks_for_it(batch, devices, said):
    """The option, or that this batch has no equal parts."""
    other = Alternative(name="data parallel", microbatches=2, devices=devices, step_s=0.2)
    plan = a_plan()
    predicted = plan.predicted.model_copy(update={"step_s": 0.332})
    changed = plan.model_copy(update={"alternatives": (other,), "batch": batch, "predicted": predicted})
    assert verdict(changed).text.endswith(said)


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


def test_calls_of_a_unit_are_one_row():
    """A unit that the forward calls twice has one row, of both calls."""
    profile = a_profile(NETDICT[:2])
    again = profile.nodes[0].model_copy(update={"name": "net1_block11_1", "param_bytes": 0})
    times = [m.model_copy(update={"node": again.name}) for m in profile.measurements if m.node == profile.nodes[0].name]
    update = {"nodes": (*profile.nodes, again), "measurements": (*profile.measurements, *times)}
    one, both = (text_of(ProfileReport(each), 100) for each in (profile, profile.model_copy(update=update)))
    assert re.search(r"block11 .* 6\.10 ms", one)
    assert re.search(r"block11 \(2 calls\) .* 12\.2 ms", both)
    assert both.count("block11") == 1


def test_what_the_output_takes_has_a_row():
    """The rows of the table are all that the total sums."""
    profile = a_profile(NETDICT[:2])
    end = profile.nodes[-1].model_copy(update={"name": "output", "kind": "output", "unit": "", "type": "output"})
    times = [m.model_copy(update={"node": "output"}) for m in profile.measurements if m.node == profile.nodes[0].name]
    update = {"nodes": (*profile.nodes, end), "measurements": (*profile.measurements, *times)}
    text = text_of(ProfileReport(profile.model_copy(update=update)), 100)
    assert re.search(r"output and its loss .* 6\.10 ms", text)


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


@pytest.mark.parametrize(("schedule", "named"), [("1f1b", "1F1B"), ("gpipe", "GPipe"), ("zero-bubble", "zero-bubble")])
@pytest.mark.parametrize(("microbatches", "said"), [(1, True), (2, False)])
def test_a_bound_names_the_schedule_where_that_limits_the_stages(schedule, named, microbatches, said):
    """With fewer micro-batches than devices all others have fewer splits than GPipe; a bound is on their own alone."""
    plan = a_plan()
    parts = {"backward_input_s": 0.0121, "backward_weight_s": 0.0121}
    stages = tuple(stage.model_copy(update=parts) for stage in plan.stages)
    update = {"schedule": schedule, "microbatches": microbatches, "profiled_devices": plan.devices, "stages": stages}
    text = text_of(PlanReport(plan.model_copy(update=update)), 100)
    assert (f"proven for every split by {named}" in text) is said
    assert (f"no split by {named} has a smaller largest load" in text) is said
