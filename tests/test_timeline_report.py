"""The drawn step: who does what at which moment."""

from __future__ import annotations

import io

from rich.console import Console

import shardwright as sw
from shardwright.reports.layout import Glyphs
from shardwright.reports.timeline_report import timeline_drawn


def drawn(plan, width=80, ascii_only=False):
    """The lines below the title."""
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    options = console.options.update(width=width)
    options.encoding = "ascii" if ascii_only else "utf-8"
    for part in timeline_drawn(plan, options, Glyphs.of(options)):
        console.print(part)
    text = console.file.getvalue()
    return text, [line.split()[1] for line in text.splitlines() if line.strip().startswith(("x ", "y "))]


def plan_of(microbatches=2, train=True, **more):
    units = [{"name": name, "forward_s": 1.0, **({"backward_s": 2.0} if train else {})} for name in ("a", "b")]
    costs = sw.Costs(devices={"x": {}, "y": {}}, microbatches=microbatches, train=train, units=units)
    return sw.plan(costs.profile(), pins={"a": "x", "b": "y"}, microbatches=microbatches, **more)


def test_each_moment_shows_what_a_device_does():
    """1F1B of two stages and micro-batches: 9 s, a forward of 1 s and a backward of 2 s each."""
    _, lines = drawn(plan_of(), width=2 + 1 + 2 + 36)
    assert lines[0].replace("·", ".") == "0000" + "1111" + 8 * "." + 8 * "a" + 4 * "." + 8 * "b"
    assert lines[1].replace("·", ".") == "...." + "0000" + 8 * "a" + "1111" + 8 * "b" + 8 * "."


def test_inference_has_forwards_alone_and_ascii_has_dots():
    text, lines = drawn(plan_of(train=False), width=2 + 1 + 2 + 30, ascii_only=True)
    assert lines == ["0" * 10 + "1" * 10 + "." * 10, "." * 10 + "0" * 10 + "1" * 10]
    assert "backward" not in text


def test_one_stage_and_too_little_room_draw_nothing():
    assert drawn(plan_of(), width=20)[0] == ""
    alone = sw.plan(sw.Costs(devices={"x": {}}, train=False, units=[{"name": "a", "forward_s": 1.0}]).profile())
    assert drawn(alone)[0] == ""
