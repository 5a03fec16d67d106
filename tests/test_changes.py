"""With what a split would be worth it where it is not: each change against planning with it."""

import io
import math

import pytest
from rich.console import Console

from shardwright.profiler.profile import Link
from shardwright.reports.plan_report import PlanReport, verdict
from shardwright.sharder.planning.formulation.blocks import problem_from_graph
from shardwright.sharder.planning.plan import WORTHWHILE, Change
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.pricing import baseline_of
from shardwright.sharder.planning.verdict.changes import changes_tried


def text_of(report):
    """What a wide console would show."""
    stream = io.StringIO()
    Console(file=stream, width=200).print(report)
    return stream.getvalue()


def over_links(profile, latency_s, bandwidth):
    """The profile with other links."""
    links = (
        Link(source=li.source, target=li.target, latency_s=latency_s, bandwidth_bytes_per_s=bandwidth)
        for li in profile.links
    )
    return profile.model_copy(update={"links": tuple(links)})


def test_a_larger_batch_that_pays_is_found(chain_profile):
    """Transfers and an empty pipeline eat the gain of two micro-batches, not of many: planned, it is as predicted."""

    def at(factor):
        larger = chain_profile(2, microbatches=(2 * factor,), forward_s=float(factor), tensor_bytes=100 * factor)
        return plan(over_links(larger, 0.5, 1e9))

    (change,) = [change for change in at(1).changes if change.what == "batch"]
    batch = change.pays
    assert change.tried[-1] == batch.factor
    assert batch.microbatches == 2 * batch.factor
    paid = at(batch.factor).predicted
    assert (paid.step_s, paid.speedup) == (pytest.approx(batch.step_s), pytest.approx(batch.speedup))
    assert batch.speedup >= WORTHWHILE
    assert at(batch.factor // 2).changes is not None  # half as much is not worth it


def test_a_larger_batch_that_pays_is_found_where_one_device_is_the_best_split(chain_profile):
    """One micro-batch gives a pipeline nothing: planned with more of them, the split is as predicted."""

    def at(factor):
        larger = chain_profile(8, microbatches=(factor,), forward_s=float(factor), tensor_bytes=100 * factor)
        return plan(over_links(larger, 0.1, 1e3))

    alone = at(1)
    assert len(alone.stages) == 1
    (change,) = [change for change in alone.changes if change.what == "batch"]
    batch = change.pays
    assert batch.microbatches == batch.factor == change.tried[-1]
    paid = at(batch.factor).predicted
    assert (paid.step_s, paid.speedup) == (pytest.approx(batch.step_s), pytest.approx(batch.speedup))
    assert paid.speedup >= WORTHWHILE
    words = f"a batch {batch.factor} times as large, in micro-batches of the same size"
    assert f"What would change that: {words}" in text_of(PlanReport(alone))


def test_without_time_no_change_is_claimed(chain_profile):
    """Neither batches nor links are said to be tried for which no split was looked for."""
    profile = chain_profile(8, microbatches=(1,))
    baseline = baseline_of([problem_from_graph(profile.graph(1))], profile)
    found = changes_tried([baseline], baseline, profile, -math.inf)
    assert all(change.pays is None for change in found)
    assert len(changes_tried([baseline], baseline, profile, math.inf)) == 2


def test_faster_links_that_pay_are_found(chain_profile):
    """With links of that speed the planner itself shards; with those of the step before it does not."""
    profile = over_links(chain_profile(8, microbatches=(4,), tensor_bytes=1000), 0.0, 25.0)
    result = plan(profile)
    (links,) = [change.pays for change in result.changes if change.what == "links"]
    faster = plan(over_links(profile, 0.0, 25.0 * links.factor))
    assert verdict(faster).shard
    assert faster.predicted.step_s == pytest.approx(links.step_s)
    slower = {2: 1, 4: 2, 10: 4}[links.factor]
    assert not verdict(plan(over_links(profile, 0.0, 25.0 * slower))).shard


def test_where_nothing_pays_it_says_so(chain_profile):
    """One unit cannot be split, whatever the batch and the links are."""
    result = plan(chain_profile(1))
    batch, links = result.changes
    assert (batch.what, batch.pays, links.what, links.pays) == ("batch", None, "links", None)
    words = f"links up to {max(links.tried)} times as fast."
    assert f"a batch up to {max(batch.tried)} times as large, in micro-batches of the same size, {words}" in text_of(
        PlanReport(result)
    )


def test_what_was_tried_is_told_as_the_plan_records_it(chain_profile):
    """Whatever factors the search takes; where it could price nothing, that is said."""
    result = plan(chain_profile(1))
    changes = (Change(what="batch", tried=(2, 6), pays=None), Change(what="links", tried=(3,), pays=None))
    text = text_of(PlanReport(result.model_copy(update={"changes": changes})))
    assert "a batch up to 6 times as large, in micro-batches of the same size, links up to 3 times as fast." in text
    assert "No change of it could be priced." in text_of(PlanReport(result.model_copy(update={"changes": ()})))


def test_a_batch_that_does_not_fit_is_not_said_to_be_tried(chain_profile):
    """The engine's buffers are of all micro-batches: what little memory leaves no room for is not claimed."""
    profile = over_links(chain_profile(2, microbatches=(2,), tensor_bytes=100), 0.7, 1e9)

    def batches(result):
        return next(change.tried for change in result.changes if change.what == "batch")

    roomy = plan(profile)
    whole = roomy.stages[0].memory_bytes
    assert batches(roomy) == (2, 4, 8, 16, 32)
    assert batches(plan(profile, memory={"cpu:0": whole, "cpu:1": whole})) == (2, 4, 8, 16)


def test_a_plan_worth_it_needs_no_change(chain_profile):
    """Nor does one that no single device holds."""
    assert plan(chain_profile(8)).changes is None
    static = 2 * 8 * 1_000_000
    large = chain_profile(8, param_bytes=1_000_000)
    assert plan(large, memory={"cpu:0": static - 1, "cpu:1": static - 1}).changes is None


def test_the_changes_are_in_words(chain_profile):
    """Beside the verdict."""
    profile = over_links(chain_profile(8, microbatches=(4,), tensor_bytes=1000), 0.0, 25.0)
    text = text_of(PlanReport(plan(profile)))
    assert "What would change that:" in text
    assert "times as fast" in text
