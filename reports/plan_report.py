"""The plan for a person: whether to shard and how, what each device gets, and how good that is provably."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from shardwright.reports.free_report import (
    LIFTED,
    candidates_of_free,
    certificate_of_free,
    devices_of_free,
    peak_of,
    prices_of_wishes,
    verdict_of_free,
)
from shardwright.reports.interleaved_report import (
    device_loads_s,
    devices_of_interleaved,
    rival_schedule_in_words,
    schedule_in_words,
    weighed,
)
from shardwright.reports.layout import Column, Glyphs, bar, facts, listing, name_ranges, section, tables
from shardwright.reports.quantities import count, number_of_bytes, percent, ratio, seconds, used_of
from shardwright.reports.replicas_report import in_replicas, pipelines_of, rival_in_words
from shardwright.reports.timeline_report import timeline_drawn
from shardwright.sharder.planning.plan import WORTHWHILE, Alternative, Change, Changeable, Placement, Plan

__all__ = ["PlanReport", "Verdict", "verdict"]

LEAST_SHOWN = 0.05
"""Percent: less is rounded to none."""
NAMED = 4
"""So many units whose weights are on no device are named in the verdict."""
LEAST_OF_LOAD = 0.02
"""Where an update is a smaller part of every stage's load, a narrow report has no column for it."""
SURE = 0.9
"""A plan that beats its rival in fewer of the draws is best only by noise."""


class Verdict(NamedTuple):
    """What to do, in a sentence or two."""

    shard: bool
    text: str


def _joined(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def verdict(plan: Plan) -> Verdict:
    """Whether to shard, over what, and what to expect of it; and whether data parallel would be faster."""
    if not plan.contiguous:
        return Verdict(*verdict_of_free(plan))
    shard, text = _verdict_of_splits(plan)
    text += (
        _offloaded_in_words(plan) + _recomputed_in_words(plan) + rival_in_words(plan) + rival_schedule_in_words(plan)
    )
    if plan.other_schedule is not None:
        text = f"{text} {weighed(plan, plan.other_schedule)}"
    parallel = next((one for one in plan.alternatives if one.name == "data parallel" and one.step_s is not None), None)
    if parallel is None or not parallel.step_s or parallel.step_s * WORTHWHILE > plan.predicted.step_s:
        return Verdict(shard, text)
    faster = ratio(plan.predicted.step_s / parallel.step_s)
    return Verdict(
        shard,
        f"{text} Data parallel over {parallel.devices} devices, the whole model on each and a part of the batch, would "
        f"take {seconds(parallel.step_s)}: faster by {faster}{_how_in_parallel(plan, parallel)}.",
    )


def _how_in_parallel(plan: Plan, parallel: Alternative) -> str:
    """What asks for data parallel, or what batch it would take."""
    if plan.batch % parallel.devices:
        return f", with a batch that is a multiple of {parallel.devices}; {plan.batch} is not"
    asked = plan.objective == "throughput" and parallel.microbatches % parallel.devices == 0 and not plan.obstacles
    return f" (--replicas {parallel.devices})" if asked else ""


def _offloaded_in_words(plan: Plan) -> str:
    """Whose weights are on no device between calls, and where they are."""
    parts = []
    for tier, where in (("cpu", "in the host's memory"), ("disk", "on its disk")):
        units = [unit for unit, kept in plan.offloaded.items() if kept == tier]
        shown = units if len(units) <= NAMED else [*units[: NAMED - 1], f"{len(units) - NAMED + 1} more units"]
        parts += [f"those of {_joined(shown)} stay {where}"] if units else []
    if not parts:
        return ""
    return f" Not all weights fit on the devices: {_joined(parts)}, and are brought for each call."


def _recomputed_in_words(plan: Plan) -> str:
    """Which stages are computed anew, and what that was chosen against."""
    if not plan.recomputed:
        return ""
    found, several = [str(stage.index) for stage in plan.recomputed], False
    if len(plan.stages) == 1:
        who = "It"
    elif len(found) == len(plan.stages):
        who = "Every stage"
    else:
        several = len(found) > 1
        who = f"Stage{'s' if several else ''} {_joined(found)}"
    text = (
        f" {who} {'keep' if several else 'keeps'} no activations and {'compute' if several else 'computes'} them anew"
    )
    kept = next((one for one in plan.alternatives if one.name == "nothing anew"), None)
    if kept is None:
        return f"{text} in the backward, as was asked for."
    if kept.step_s is None:
        return f"{text} in the backward: without that, {kept.why}."
    return f"{text} in the backward: the best split without that takes {seconds(kept.step_s)} a step."


def _verdict_of_splits(plan: Plan) -> Verdict:
    predicted = plan.predicted
    step = seconds(predicted.step_s)
    if plan.obstacles and len(plan.devices) > 1:
        return _verdict_of_obstacle(plan)
    if len(plan.stages) == 1 and plan.replicas == 1:
        splits = [candidate for candidate in plan.candidates if candidate.stages > 1]
        text = f"Do not shard this: keep it on {plan.devices[0]}, {step} a step."
        if not splits:
            return Verdict(False, f"{text} {_none_better(plan)}")
        best = min(splits, key=lambda candidate: candidate.step_s)
        devices = best.stages // best.stages_per_device
        obeying = " that obeys the pins" if plan.pins else ""
        plain = best.stages_per_device == 1 and not best.zero_bubble
        if plain and predicted.step_s >= best.step_s * WORTHWHILE and any(c.stages_per_device > 1 for c in splits):
            obeying += " (--schedule 1f1b)"  # of which none was asked for
        return Verdict(
            False,
            f"{text} The best split{obeying}, over {devices} devices with "
            f"{count(best.microbatches, 'micro-batch')}, would take {seconds(best.step_s)} "
            f"({ratio(predicted.step_s / best.step_s)}).",
        )
    split = f"over {_joined(plan.devices)} with {count(plan.microbatches, 'micro-batch')}"
    if plan.replicas > 1:
        split = f"{in_replicas(plan)} {split}"
    if predicted.baseline_s is None or predicted.speedup is None:
        why = "no single device holds it" + ("" if plan.offloaded else ", sharding is what makes it fit")
        return Verdict(True, f"Shard this {split}: {why}. Expect {step} a step.")
    alone = f"{predicted.baseline_device} alone"
    if predicted.baseline_microbatches > 1:  # costs are of one number, whatever would fit
        same = predicted.baseline_microbatches == plan.microbatches
        why = "which needs {} to fit" if plan.of_model else "also in {}" if same else "there in {}"
        alone += f" ({why.format(count(predicted.baseline_microbatches, 'micro-batch'))})"
    steps = f"{step} a step instead of {seconds(predicted.baseline_s)}"
    if predicted.speedup < WORTHWHILE:
        return Verdict(
            False,
            f"Do not shard this: {split} it runs at only {ratio(predicted.speedup)} the speed of {alone}, {steps}. "
            f"Keep it on {predicted.baseline_device}.",
        )
    return Verdict(True, f"Shard this {split}: expect {ratio(predicted.speedup)} the speed of {alone}, {steps}.")


def _none_better(plan: Plan) -> str:
    """That no split is better, and what there is without the pins or groups that leave none."""
    predicted = plan.predicted
    lifted = [change for change in plan.changes or () if change.what in LIFTED]
    paying = next((change for change in lifted if change.pays is not None), None)
    if paying is not None and paying.pays is not None:
        return (
            f"{LIFTED[paying.what].capitalize()} leave no better split; without them one takes "
            f"{seconds(paying.pays.step_s)} ({ratio(paying.pays.speedup)} the speed of "
            f"{predicted.baseline_device} alone)."
        )
    if plan.objective == "memory":
        return "No split that was found, within pins and groups, fills its fullest device less."
    if plan.offloaded and not plan.certificate.exact:
        return "No better split was found."
    if not plan.pins:
        return "No split is better."
    if predicted.baseline_s is not None and predicted.baseline_s < predicted.step_s:
        return (
            f"The pins leave nothing better; without them {predicted.baseline_device} alone takes "
            f"{seconds(predicted.baseline_s)}."
        )
    return "No split that obeys the pins is better."


def _verdict_of_obstacle(plan: Plan) -> Verdict:
    """Of a plan that can be placed at best."""
    predicted, why = plan.predicted, f"It cannot be piped: {plan.obstacles[0]}"
    if plan.replicas > 1:
        return Verdict(False, f"Do not shard this {in_replicas(plan)}. {why}.")
    why += ". Placed, the devices work one after another"
    alone = f"Do not shard this: keep it on {predicted.baseline_device}. {why}, no faster than one."
    placed = f"Place this over {_joined(plan.devices)}: no single device holds it. {why}."
    return Verdict(predicted.baseline_s is None, placed if predicted.baseline_s is None else alone)


class PlanReport:
    """A plan as a rich renderable, from about 60 columns up."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Verdict, stages, memory, certificate, candidates, timeline, placement."""
        glyphs = Glyphs.of(options)
        yield from self._verdict()
        free = not self.plan.contiguous
        yield from devices_of_free(self.plan, self._names(), options, glyphs) if free else self._stages(options, glyphs)
        yield from self._memory(options, glyphs)
        yield from certificate_of_free(self.plan) if free else self._certificate()
        yield from candidates_of_free(self.plan, options, glyphs) if free else self._candidates(options, glyphs)
        yield from timeline_drawn(self.plan, options, glyphs)
        yield from self._placement(glyphs)

    def _verdict(self) -> Iterator[RenderableType]:
        plan, (shard, text) = self.plan, verdict(self.plan)
        work = f"training with {plan.optimizer}" if plan.train else "inference"
        of_costs = f"{plan.model}, {'training' if plan.train else 'inference'}, by costs as given"
        yield Text(text, style="bold green" if shard else "bold yellow")
        yield Text(f"{plan.model}, {work}, batch {plan.batch}" if plan.of_model else of_costs, style="dim")
        if plan.changes is not None and not shard:
            yield Text(_what_would_change(plan.changes))
        if plan.sensitivity is not None and plan.sensitivity.faster_share < SURE:
            found, best = plan.sensitivity, plan.predicted.step_s <= plan.sensitivity.rival_step_s
            yield Text(
                f"{'Best only by noise' if best else 'Not the fastest'}: with costs drawn within their uncertainty, "
                f"{found.rival} is as fast or faster in {percent(100 * (1 - found.faster_share))} of the draws.",
                style="yellow",
            )
        declared = [device for device in plan.devices if device in plan.declared_devices]
        if declared:
            yield Text(f"Nothing was measured on {_joined(declared)}: the times there are estimates.", style="yellow")

    def _names(self) -> Column:
        if not self.plan.contiguous:
            return Column("device", self.plan.devices, "left")
        return Column("stage", [f"{stage.index}  {stage.device}" for stage in self.plan.stages], "left")

    def _stages(self, options: ConsoleOptions, glyphs: Glyphs) -> Iterator[RenderableType]:
        """Compute and transfers of one micro-batch, and the load of one step, which is their sum over all of them."""
        plan, stages = self.plan, self.plan.stages

        def times(values: Sequence[float]) -> list[str]:
            return [seconds(value) if value else glyphs.none for value in values]

        # A transfer is at both of its ends: each stage has those behind it and those before it.
        behind = [stage.send_forward_s + stage.receive_backward_s for stage in stages]
        transfers = [
            own
            + (before if stage.receive_forward_s is None else stage.receive_forward_s + (stage.send_backward_s or 0.0))
            for stage, own, before in zip(stages, behind, [0.0, *behind], strict=False)
        ]
        largest = max(stage.load_s for stage in stages) or 1.0
        weights = [stage.backward_weight_s or 0.0 for stage in stages]
        anew = ["yes" if stage.recompute else glyphs.none for stage in stages]
        counts = any(stage.update_s > LEAST_OF_LOAD * stage.load_s for stage in stages)
        schedule = schedule_in_words(plan.schedule, plan.stages_per_device)
        note = "times of the whole batch; load of a step, with the optimizer's update" if plan.train else ""
        if plan.train and plan.schedule == "gpipe":  # as it may have been chosen: 1F1B needs more micro-batches
            note += f", {schedule}"
        if plan.microbatches > 1:
            part = f"one of {plan.microbatches} micro-batches"
            if plan.of_model:
                part = f"one micro-batch ({plan.batch / plan.microbatches:.3g} of {plan.batch} samples)"
            note = f"compute and transfers of {part}; load of a whole step, {schedule}"
        if plan.replicas > 1:
            note += f"; each of {plan.replicas} replicas takes {plan.pipeline_microbatches} of {plan.microbatches}"
        note += _transfers_in_words(plan)
        if plan.schedule == "zero-bubble":
            note += "; of weights: the part of the backward that may wait, on the first stage all of it"
        note += "; the backward of a recomputed stage has its forward in it" if plan.recomputed else ""
        yield section("Stages", note)
        yield from tables(
            self._names(),
            [
                Column("units", [_first_of(stage.units, glyphs) for stage in stages], "left", drop=3),
                Column("forward", times([stage.forward_s for stage in stages])),
                *([Column("backward", times([stage.backward_s for stage in stages]))] if plan.train else []),
                *([Column("of weights", times(weights))] if plan.schedule == "zero-bubble" else []),
                *([Column("recomputed", anew)] if plan.recomputed else []),
                Column("transfers", times(transfers)),
                *(
                    [Column("update", times([stage.update_s for stage in stages]), drop=1 if counts else 4)]
                    if plan.train
                    else []
                ),
                *(
                    [Column("sum", times([stage.sum_s for stage in stages]))]
                    if plan.train and plan.replicas > 1
                    else []
                ),
                Column("load", times([stage.load_s for stage in stages])),
                Column("", [bar(s.load_s / largest, 12, glyphs) for s in stages], "left", "cyan", drop=2, tight=True),
            ],
            options=options,
        )
        yield from pipelines_of(plan)

    def _memory(self, options: ConsoleOptions, glyphs: Glyphs) -> Iterator[RenderableType]:
        if self.plan.stages_per_device > 1:
            yield from devices_of_interleaved(self.plan, options, glyphs)
            return
        stages = self.plan.stages
        shares = [stage.memory_bytes / stage.memory_cap_bytes for stage in stages]
        note = "predicted peak of each device, of its cap; in flight: micro-batches held at once"
        yield section("Memory", f"{note}; the same in every replica" if self.plan.replicas > 1 else note)
        yield from tables(
            self._names(),
            [
                Column(
                    "params",
                    [number_of_bytes(stage.param_bytes) if stage.param_bytes else glyphs.none for stage in stages],
                ),
                Column("in flight", [str(stage.in_flight) for stage in stages]),
                Column("memory", [used_of(stage.memory_bytes, stage.memory_cap_bytes) for stage in stages]),
                Column("", [percent(100 * share) for share in shares], drop=1),
                Column("", [bar(s, 12, glyphs, track=True) for s in shares], "left", "cyan", drop=2, tight=True),
            ],
            options=options,
        )

    def _certificate(self) -> Iterator[RenderableType]:
        plan, certificate = self.plan, self.plan.certificate
        within = "" if plan.peak is None else " with no larger peak share"
        if plan.stages_per_device > 1:
            within = f" with {plan.stages_per_device} stages on each device"
        elif plan.train and plan.microbatches < len(plan.profiled_devices):
            # All but GPipe need a micro-batch for each stage.
            within = f" by {schedule_in_words(plan.schedule, 1)}{within}"
        heaviest = max(plan.stages, key=lambda stage: stage.load_s)
        where = f"stage {heaviest.index} on {heaviest.device}"
        if plan.stages_per_device > 1:
            loads = device_loads_s(plan)
            where = f"the {plan.stages_per_device} stages of {plan.devices[loads.index(max(loads))]}"
        if plan.offloaded:
            within += ", whatever weights it brings,"
        if plan.replicas > 1:
            within += f" over this mesh of {plan.replicas} replicas"
        gap = percent(certificate.gap_percent)
        if certificate.least_s is not None:
            gap += (
                f", for a step of {seconds(plan.predicted.step_s)}: that of the split with the least largest load, "
                f"{seconds(certificate.least_s)}, is {seconds(certificate.least_step_s or 0.0)}"
            )
        elif certificate.exact:
            gap += f", exact: no split{within} has a smaller largest load"
        elif certificate.gap_percent < LEAST_SHOWN:
            gap += ", it meets the bound"
        else:
            gap += " at most, not proven exact"
        split = len(plan.devices) > 1
        yield section("Certificate", f"at {count(plan.microbatches, 'micro-batch')}" if split else "")
        yield facts(
            [
                *peak_of(plan),
                ("largest load", f"{seconds(certificate.value_s)} a step, {where}"),
                ("lower bound", f"{seconds(certificate.bound_s)}, proven for every split{within.rstrip(',')}"),
                ("gap", gap),
                *_step_in_words(certificate.step_gap_percent, within),
                ("what binds", certificate.binds),
                *prices_of_wishes(plan, certificate.least_s or certificate.value_s),
                *self._uncertainty(),
            ]
        )

    def _uncertainty(self) -> Iterator[tuple[str, str]]:
        """How the prediction and the plan move within the uncertainty of the profile."""
        found = self.plan.sensitivity
        if found is None:
            return
        low, high = seconds(found.step_low_s), seconds(found.step_high_s)
        text = f"step {low} to {high} in 90% of {found.draws} draws of the costs"
        if found.rival:
            text += f"; not slower than {found.rival} in {percent(100 * found.faster_share)} of them"
        yield "uncertainty", text
        if found.replans is not None:
            most = percent(found.replans.most_lost_percent)
            yield (
                "planned anew",
                f"another split was better in {found.replans.others} of {count(found.replans.planned, 'draw')}, its "
                f"largest load smaller by {most} at most",
            )

    def _candidates(self, options: ConsoleOptions, glyphs: Glyphs) -> Iterator[RenderableType]:
        """What was weighed: one device, the best split at each number of micro-batches, and what one would do else."""
        plan, predicted = self.plan, self.plan.predicted
        rows = []
        if predicted.baseline_s is not None:
            alone = not any(candidate.chosen for candidate in plan.candidates)
            step = seconds(predicted.baseline_s)
            rows.append(
                (
                    f"{predicted.baseline_device} alone",
                    str(predicted.baseline_microbatches),
                    "1",
                    step,
                    step,
                    ratio(1),
                    alone,
                )
            )
        for c in plan.candidates:
            speedup = glyphs.none if c.speedup is None else ratio(c.speedup)
            name = "best split" if c.stages > 1 else "no split"
            name = f"interleaved by {c.stages_per_device}" if c.stages_per_device > 1 else name
            name = "zero-bubble" if c.zero_bubble else name
            name = name if c.replicas == 1 else f"{c.replicas} replicas" + (", interleaved" * (c.stages_per_device > 1))
            load, step = seconds(c.bottleneck_s), seconds(c.step_s)
            devices = str(c.stages // c.stages_per_device * c.replicas)
            rows.append((name, str(c.microbatches), devices, load, step, speedup, c.chosen))
        for other in plan.alternatives:
            if other.step_s is not None:
                speedup = glyphs.none if other.speedup is None else ratio(other.speedup)
                step, devices = seconds(other.step_s), str(other.devices)
                name = f"{other.replicas} replicas" if other.name == "replicas" else other.name
                name = f"{name} by 2" if name == "interleaved" else name
                rows.append((name, str(other.microbatches), devices, glyphs.none, step, speedup, False))
        if not rows:
            return
        names, microbatches, devices_each, loads, steps, speedups, chosen = zip(*rows, strict=True)
        bubble = f"; bubble {percent(100 * predicted.bubble)}" if len(plan.devices) > 1 else ""
        yield section("Predicted", f"a step is the largest load, and filling and draining the pipeline{bubble}")
        yield from tables(
            Column("candidate", names, "left"),
            [
                Column("micro-batches", microbatches),
                Column("devices", devices_each, drop=1),
                Column("largest load", loads, drop=2),
                Column("step", steps),
                Column("speedup", speedups),
                Column("", [f"{glyphs.chosen} chosen" if it else "" for it in chosen], "left", tight=True),
            ],
            options=options,
            row_styles=["bold" if it else "" for it in chosen],
        )
        for other in plan.alternatives:
            if other.step_s is None:
                yield Text(f"  {other.name}: {other.why}", style="dim")

    def _placement(self, glyphs: Glyphs) -> Iterator[RenderableType]:
        """Every unit under its container and device, then the glue."""
        rows = [
            (container or "(model)", device, name_ranges(names, glyphs.dots))
            for (container, device), names in _by_container(self.plan.nodes).items()
        ]
        glue: dict[str, list[str]] = {}
        for node in self.plan.nodes:
            if node.kind == "glue":
                glue.setdefault(node.device, []).append(node.node)
        rows += [("glue", device, name_ranges(names, glyphs.dots)) for device, names in glue.items()]
        yield section("Placement", "in the first replica" if self.plan.replicas > 1 else "")
        yield listing(("container", "device", "units"), rows)
        for tier, where in (("cpu", "in the host's memory"), ("disk", "on disk, in the checkpoint")):
            units = [unit for unit, kept in self.plan.offloaded.items() if kept == tier]
            if units:
                yield section("Offloaded", f"weights that stay {where} and are brought in for each call")
                yield listing(("", "", "units"), [("", "", name_ranges(units, glyphs.dots))])


def _what_would_change(changes: Sequence[Change]) -> str:
    """With what a split would be worth it, or that nothing which was tried is enough."""
    found = [
        f"{_change_in_words(change.what, str(change.pays.factor))} ({ratio(change.pays.speedup)} with "
        f"{count(change.pays.microbatches, 'micro-batch')})"
        for change in changes
        if change.pays is not None
    ]
    if found:
        return f"What would change that: {'; or '.join(found)}."
    tried = [_change_in_words(change.what, f"up to {max(change.tried)}") for change in changes]
    return f"Nothing that was tried changes that: {', '.join(tried)}." if tried else "No change of it could be priced."


def _change_in_words(what: Changeable, times: str) -> str:
    """A batch or links so many ``times`` as large or as fast, or what to plan without."""
    if what in LIFTED:
        return f"planning without {LIFTED[what]}"
    if what == "links":
        return f"links {times} times as fast"
    return f"a batch {times} times as large, in micro-batches of the same size"


def _step_in_words(gap: float | None, within: str) -> Iterator[tuple[str, str]]:
    """How far the step can be above the shortest."""
    if gap == 0:
        yield "step", f"no split{within} has a shorter one at these times"
    elif gap is not None:
        above = f"at most {percent(gap)}" if gap >= LEAST_SHOWN else "less than 0.1%"
        yield "step", f"{above} above the shortest of every split{within}, proven"


def _transfers_in_words(plan: Plan) -> str:
    """How tensors pass, where that is not as the pipeline engine does it."""
    ways = {"relayed": "", "staged": "transfers through the host's memory", "direct": "transfers to each reader"}
    said = [words for words in (ways[plan.transfers], "overlapped with compute" if plan.overlap else "") if words]
    return "; " + ", ".join(said) if said and len(plan.stages) > 1 else ""


def _first_of(units: Sequence[str], glyphs: Glyphs) -> str:
    """The first of a stage's units, and how many they are."""
    if len(units) == 1:
        return units[0]
    return f"{units[0]} {glyphs.dots} ({count(len(units), 'unit')})" if units else glyphs.none


def _by_container(nodes: Sequence[Placement]) -> dict[tuple[str, str], list[str]]:
    """(container, device) -> the names of its children there, in the order of the forward.

    A numbered child that lies on one device whole, such as ``layers.0`` with its own units, is named as one.
    """
    devices: dict[str, set[str]] = {}
    units = {node.unit: node.device for node in nodes if node.kind == "unit"}
    for unit, device in units.items():
        parts = unit.split(".")
        for end in range(1, len(parts) + 1):
            devices.setdefault(".".join(parts[:end]), set()).add(device)
    found: dict[tuple[str, str], dict[str, None]] = {}
    for unit, device in units.items():
        parts = unit.split(".")
        whole = (
            end
            for end in range(1, len(parts))
            if parts[end - 1].isdecimal() and len(devices[".".join(parts[:end])]) == 1
        )
        end = next(whole, len(parts))
        found.setdefault((".".join(parts[: end - 1]), device), {})[parts[end - 1]] = None
    # A container's rows stand together, where it first occurs.
    containers = list(dict.fromkeys(container for container, _ in found))
    return {key: list(found[key]) for key in sorted(found, key=lambda key: containers.index(key[0]))}
