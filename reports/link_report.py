"""The links of a profile for a person: how fast they are, which way they go, and whether they can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import ConsoleOptions, RenderableType
from rich.text import Text

from shardwright.profiler.profile import Link
from shardwright.reports.layout import Column, Glyphs, indented, section, tables
from shardwright.reports.origins import mark
from shardwright.reports.quantities import bandwidth, count, number_of_bytes, seconds

__all__ = ["link_section", "remedy"]


def link_section(links: Sequence[Link], options: ConsoleOptions) -> Iterator[RenderableType]:
    """A row for each link; below them a sentence about each that changes what it carries."""
    if not links:
        return
    glyphs = Glyphs.of(options)
    busy = any(link.busy_latency_s is not None for link in links)
    together = "one at a time; and all at once: every device sends to one and receives from another"
    yield section("Links", together if busy else "")
    yield from tables(
        Column("link", [f"{link.source} {glyphs.arrow} {link.target}" for link in links], "left"),
        [],
        _groups(links, glyphs),
        options=options,
        row_styles=["red" if link.corrupt else "" for link in links],
    )
    for link in links:
        if link.corrupt:
            yield indented(
                Text(
                    f"{link.source} {glyphs.arrow} {link.target} changes what it carries: of "
                    f"{number_of_bytes(link.probed_bytes)} sent, {count(link.wrong_bytes, 'byte')} arrived wrong. "
                    f"No plan uses it. {remedy(link)}",
                    style="red",
                )
            )


def _groups(links: Sequence[Link], glyphs: Glyphs) -> list[list[Column]]:
    """Times by themselves; times all at once, the way, and the check, where some link has them."""
    groups = [
        [
            Column("latency", [mark([link.origin], glyphs) + seconds(link.latency_s) for link in links]),
            Column(
                "bandwidth", [mark([link.origin], glyphs) + bandwidth(link.bandwidth_bytes_per_s) for link in links]
            ),
        ]
    ]
    if any(link.busy_latency_s is not None for link in links):
        latencies = [glyphs.none if (s := link.busy_latency_s) is None else seconds(s) for link in links]
        rates = [glyphs.none if (r := link.busy_bandwidth_bytes_per_s) is None else bandwidth(r) for link in links]
        groups.append([Column("all at once\nlatency", latencies), Column("\nbandwidth", rates)])
    last = []
    if any(link.peer is not None for link in links):
        ways = {None: glyphs.none, True: "peer", False: "staged"}
        last.append(Column("way", [ways[link.peer] for link in links], "left"))
    if any(link.probed_bytes for link in links):
        last.append(Column("bytes", [_state(link, glyphs) for link in links], "left"))
    return [*groups, last] if last else groups


def _state(link: Link, glyphs: Glyphs) -> str:
    if not link.probed_bytes:
        return glyphs.none
    return "corrupt" if link.corrupt else "clean"


def remedy(link: Link) -> str:
    """What a user can do about a link that is corrupt."""
    if link.peer:
        return (
            "For pipelines, set NCCL_P2P_DISABLE=1 and profile again: messages then go through the host's memory. A "
            "placed model still copies from GPU to GPU; for it, turn off the IOMMU or PCIe access control (ACS), or "
            "update the driver, and profile again."
        )
    return (
        "It goes through the host's memory, so test that and the bus; until they are mended, leave one of the two out "
        "with --devices."
    )
