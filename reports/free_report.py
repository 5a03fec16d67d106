"""What a plan says that is no chain of stages, or whose objective is another than throughput."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import ConsoleOptions, RenderableType
from rich.text import Text

from shardwright.reports.layout import Column, Glyphs, bar, facts, section, tables
from shardwright.reports.quantities import count, percent, ratio, seconds
from shardwright.sharder.planning.plan import WORTHWHILE, Changeable, Plan, Price, Stage

__all__ = [
    "LIFTED",
    "candidates_of_free",
    "certificate_of_free",
    "devices_of_free",
    "peak_of",
    "prices_of_wishes",
    "verdict_of_free",
]

LIFTED: dict[Changeable, str] = {
    "pins": "the pins",
    "groups": "the groups that share a device",
    "pins and groups": "the pins and the groups that share a device",
}
"""What plans can be made without, in words."""

NO_ENGINE = "No pipeline engine runs such a plan: sw.place puts the units there"


def _part(plan: Plan) -> str:
    """What a time of one micro-batch is of."""
    if plan.microbatches == 1:
        return "the whole batch"
    if not plan.of_model:
        return f"one of {plan.microbatches} micro-batches"
    return f"one micro-batch ({plan.batch / plan.microbatches:.3g} of {plan.batch} samples)"


def _as_told(plan: Plan) -> str:
    """What pins and groups have to do with it that all is on one device."""
    lifted = next((change for change in plan.changes or () if change.what in LIFTED), None)
    if lifted is None:
        return ""
    gain, predicted = lifted.pays, plan.predicted
    told = f" within the {lifted.what}"
    if gain is not None:
        return f"{told}; without them one takes {seconds(gain.step_s)}"
    if predicted.baseline_s is not None and predicted.baseline_s < predicted.step_s * (1 - 1e-9):
        return f"{told}; without them {predicted.baseline_device} alone takes {seconds(predicted.baseline_s)}"
    return told


def verdict_of_free(plan: Plan) -> tuple[bool, str]:
    """Whether to shard, and what to expect of it."""
    predicted, latency = plan.predicted, plan.objective == "latency"
    value = seconds(predicted.step_s)
    if len(plan.stages) == 1:
        what = f"{value} from input to end" if latency else f"{value} a step"
        others = "No other assignment is better" if plan.certificate.exact else "No better assignment was found"
        return False, f"Do not shard this: keep it on {plan.devices[0]}, {what}. {others}{_as_told(plan)}."
    over = f"over {', '.join(plan.devices[:-1])} and {plan.devices[-1]}"
    if latency:
        head = f"Place this {over}, branches side by side: {_part(plan)} is through in {value}"
    else:
        step = f"a step of {count(plan.microbatches, 'micro-batch')}"
        head = f"Each unit on any device, {over}: the busiest works {value} of {step}"
    if predicted.baseline_s is None or predicted.speedup is None:
        text = f"{head}; no single device holds it."
        return True, text if latency else f"{text} {NO_ENGINE}."
    alone = f"{predicted.baseline_device} alone takes {seconds(predicted.baseline_s)}"
    worth = predicted.speedup >= WORTHWHILE
    if latency:
        end = "" if worth else f" Keep it on {predicted.baseline_device}."
        return worth, f"{head}; {alone} ({ratio(predicted.speedup)}).{end}"
    return worth, f"{head}, where {alone}: at most {ratio(predicted.speedup)}. {NO_ENGINE}."


def devices_of_free(plan: Plan, names: Column, options: ConsoleOptions, glyphs: Glyphs) -> Iterator[RenderableType]:
    """What each device computes and transfers, and its load, or when it is done."""
    shares = plan.stages

    def times(values: list[float]) -> list[str]:
        return [seconds(value) if value else glyphs.none for value in values]

    if plan.objective == "latency":
        last = max((share.finish_s or 0.0 for share in shares), default=0.0)
        yield section("Devices", f"compute of {_part(plan)}; each runs one unit at a time, transfers go on beside")
        columns = [
            Column("forward", times([share.forward_s for share in shares])),
            *([Column("backward", times([share.backward_s for share in shares]))] if plan.train else []),
            *([Column("update", times([share.update_s for share in shares]), drop=3)] if plan.train else []),
            Column("waits", times([max(0.0, last - share.load_s) for share in shares]), drop=2),
            Column("done at", times([share.finish_s or 0.0 for share in shares])),
            Column("", [_busy(plan, share, last, glyphs) for share in shares], "left", "cyan", drop=1, tight=True),
        ]
        yield from tables(names, columns, options=options)
        if plan.train and last:
            turn = max((ran.end_s for ran in plan.timeline if ran.phase == "forward"), default=0.0)
            yield Text(f"  the forward has ended everywhere, and the backward begins, at {seconds(turn)}", style="dim")
        return
    ways = {"staged": "through the host's memory", "direct": "to each device that reads", "relayed": ""}
    overlapped = ", beside compute" if plan.overlap else ""
    yield section(
        "Devices", f"compute and transfers of {_part(plan)}, {ways[plan.transfers]}{overlapped}; load of a step"
    )
    largest = max(share.load_s for share in shares) or 1.0
    yield from tables(
        names,
        [
            Column("units", [str(len(share.units)) for share in shares], drop=2),
            Column("forward", times([share.forward_s for share in shares])),
            *([Column("backward", times([share.backward_s for share in shares]))] if plan.train else []),
            Column("transfers", times([_transfers_s(share) for share in shares])),
            *([Column("update", times([share.update_s for share in shares]), drop=3)] if plan.train else []),
            Column("load", times([share.load_s for share in shares])),
            Column("", [bar(s.load_s / largest, 12, glyphs) for s in shares], "left", "cyan", drop=1, tight=True),
        ],
        options=options,
    )


def _transfers_s(share: Stage) -> float:
    others = (share.receive_forward_s or 0.0) + (share.send_backward_s or 0.0)
    return share.send_forward_s + share.receive_backward_s + others


def _busy(plan: Plan, share: Stage, last: float, glyphs: Glyphs, width: int = 24) -> str:
    """The device over time: full where it runs a unit for most of a column's time."""
    if not last:
        return ""
    busy = [0.0] * width
    for ran in plan.timeline:
        if ran.device != share.device:
            continue
        for column in range(width):
            begin, end = last * column / width, last * (column + 1) / width
            busy[column] += max(0.0, min(end, ran.end_s) - max(begin, ran.start_s))
    return "".join(glyphs.full if 2 * time >= last / width else glyphs.empty for time in busy)


def certificate_of_free(plan: Plan) -> Iterator[RenderableType]:
    """Value, bound, gap and what binds."""
    found, latency = plan.certificate, plan.objective == "latency"
    what = "finishing time" if latency else "largest load"
    gap = percent(found.gap_percent)
    within = " with no larger peak share" if plan.peak is not None else ""
    gap += f", exact: no assignment{within} has a smaller {what}" if found.exact else " at most, not proven exact"
    note = f"of {_part(plan)}" if latency else f"at {count(plan.microbatches, 'micro-batch')}"
    yield section("Certificate", note)
    of_what = "schedule" if latency else "assignment"
    yield facts(
        [
            *peak_of(plan),
            (what, seconds(found.value_s) + ("" if latency else " a step")),
            ("lower bound", f"{seconds(found.bound_s)}, proven for every {of_what}{within}"),
            ("gap", gap),
            ("what binds", found.binds),
            *([("advice", plan.advice)] if plan.advice else []),
            *prices_of_wishes(plan, found.value_s, what),
        ]
    )


def peak_of(plan: Plan) -> Iterator[tuple[str, str]]:
    """The peak share and its proof, where that is the objective."""
    peak = plan.peak
    if peak is None:
        return
    yield "peak share", f"{percent(100 * peak.value)}, {peak.binds}"
    kind = "split" if plan.contiguous else "assignment"
    proof = (
        f"exact: no {kind} has a smaller one" if peak.exact else f"{percent(peak.gap_percent)} at most above the least"
    )
    yield "its bound", f"{percent(100 * peak.bound)}, {proof}"
    yield "largest batch", f"{_batch_in_words(plan, peak.largest_batch)}, placed like this"
    if peak.larger is not None:
        over = ", ".join(peak.larger.devices)
        most = "; no split holds more" if peak.larger.proven and peak.larger.batch else ""
        yield "split otherwise", f"{_batch_in_words(plan, peak.larger.batch)}, over {over}{most}"


def _batch_in_words(plan: Plan, batch: int | None) -> str:
    if batch is None:
        return "any, in more micro-batches of this size"
    if plan.of_model:
        return f"{batch} samples, in micro-batches of {plan.batch / plan.microbatches:.3g}"
    return f"{batch * plan.microbatches // plan.batch} micro-batches of this size"


def prices_of_wishes(plan: Plan, value_s: float, what: str = "largest load") -> Iterator[tuple[str, str]]:
    """What each pin and each group costs, of the plan's peak share or of ``value_s``, which is called ``what``."""
    value = plan.peak.value if plan.peak is not None else value_s
    what = what if plan.peak is None else "peak share"
    for pin in plan.pins:
        yield f"pin {pin.unit}={pin.device}", _price_in_words(pin, value, what)
    for group in plan.groups:
        yield f"together {', '.join(group.units)}", _price_in_words(group, value, what)


def _price_in_words(price: Price, value: float, what: str) -> str:
    """What a wish costs, by the plan's value."""
    without = price.without_share if price.without_s is None else price.without_s
    if without is None:
        return f"its price was not found: {price.why}"
    if not value or without >= value * (1 - 1e-9):
        return "costs nothing" if price.exact else "nothing better was found without it"
    more = percent(100 * (value / without - 1)) if without else "all of it"
    least = percent(100 * without) if price.without_s is None else seconds(without)
    return f"costs {more}{'' if price.exact else ' or more'}: the {what} is {least} without it"


def candidates_of_free(plan: Plan, options: ConsoleOptions, glyphs: Glyphs) -> Iterator[RenderableType]:
    """One device, this plan, and what one would do else."""
    predicted, latency = plan.predicted, plan.objective == "latency"
    rows: list[tuple[str, str, float, float | None, bool]] = []
    if predicted.baseline_s is not None and predicted.baseline_device is not None:
        alone = len(plan.stages) == 1 and plan.devices[0] == predicted.baseline_device
        rows.append((f"{predicted.baseline_device} alone", "1", predicted.baseline_s, 1.0, alone))
    if not any(chosen for *_, chosen in rows):
        rows.append(("this plan", str(len(plan.stages)), predicted.step_s, predicted.speedup, True))
    rows += [
        (other.name, str(other.devices), other.step_s, other.speedup, False)
        for other in plan.alternatives
        if other.step_s is not None
    ]
    if len(rows) > 1:
        names, devices, steps, speedups, chosen = zip(*rows, strict=True)
        note = f"{_part(plan)}, from input to end" if latency else "the largest load of a step"
        yield section("Predicted", note)
        yield from tables(
            Column("candidate", names, "left"),
            [
                Column("devices", devices, drop=1),
                Column("time" if latency else "load", [*map(seconds, steps)]),
                Column("speedup", [glyphs.none if each is None else ratio(each) for each in speedups]),
                Column("", [f"{glyphs.chosen} chosen" if it else "" for it in chosen], "left", tight=True),
            ],
            options=options,
            row_styles=["bold" if it else "" for it in chosen],
        )
    for other in plan.alternatives:
        if other.step_s is None:
            yield Text(f"  {other.name}: {other.why}", style="dim")
