"""What the reports say, held by literal tables, by widths, and by golden files of the whole text.

After a wanted change of the text, renew the golden files and read their difference before committing it:

    SHARDWRIGHT_RENEW_GOLDEN=1 python -m pytest tests/test_reports.py
"""

import os

import pytest
from reported import GOLDEN, REPORTS, text_of
from rich.cells import cell_len

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
    "plan-replicas": ["in 2 replicas of 2 stages", "takes 4 of 8", "this mesh of 2 replicas", "cuda:3, cuda:1", "sum"],
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
