"""Wrong arguments of ``sw.plan`` are one line with a remedy; so are options that contradict themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardwright as sw

EXAMPLE = Path(__file__).parents[1] / "examples" / "costs.json"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"time_limit_s": "x"}, "time_limit_s is 'x'; give seconds, 0 or more"),
        ({"time_limit_s": -1}, "time_limit_s is -1; give seconds, 0 or more"),
        ({"time_limit_s": float("nan")}, "time_limit_s is nan; give seconds, 0 or more"),
        ({"replans": -4}, "replans is -4; give a whole number, 0 or more"),
        ({"replans": True}, "replans is True; give a whole number, 0 or more"),
        ({"replans": 3, "objective": "latency"}, "replans is 3, and only plans for throughput in a chain of stages"),
        ({"replans": 3, "contiguous": False}, "replans is 3, and only plans for throughput in a chain of stages"),
        ({"replans": 3, "objective": "memory"}, "replans is 3, and only plans for throughput in a chain of stages"),
        ({"stages_per_device": "x", "schedule": "interleaved"}, "stages_per_device is 'x'; give a whole number"),
        ({"pins": "head=cuda:1"}, "pins is 'head=cuda:1'; give a mapping, such as"),
        ({"pins": {5: "cuda:1"}}, "pins is {5: 'cuda:1'}; give a mapping, such as"),
        ({"memory": "10GiB"}, "memory is '10GiB'; give a mapping, such as"),
        ({"memory": {"cuda:0": 1.5}}, "1.5 is not a size in bytes; write for example 10GiB"),
        ({"devices": "cuda:0"}, "devices is 'cuda:0'; give names, such as"),
        ({"devices": [5]}, r"devices is \[5\]; give names, such as"),
        ({"together": 5}, "together is 5; give names, such as"),
        ({"together": [["body"], []]}, "together has a group that names no unit"),
        ({"together": ""}, "together has a group that names no unit"),
        ({"together": [["body"], 5]}, r"together is \[\['body'\], 5\]; give names, such as"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, says):
    profile = sw.Costs.load(EXAMPLE).profile()
    with pytest.raises(sw.ShardwrightError, match=says) as raised:
        sw.plan(profile, **arguments)
    assert "\n" not in str(raised.value)


def test_a_generator_of_devices_is_as_good_as_a_list():
    """It can be gone through only once."""
    profile = sw.Costs.load(EXAMPLE).profile()
    names = ["cuda:0", "cuda:1"]
    assert sw.plan(profile, devices=iter(names)).stages == sw.plan(profile, devices=names).stages


@pytest.mark.parametrize(
    ("option", "values", "says"),
    [
        ("--pin", ("decoder=cuda:1", "decoder=cuda:0"), "--pin gives decoder both cuda:1 and cuda:0; keep one"),
        ("--memory", ("cuda:0=10GiB", "cuda:0=20GiB"), "--memory gives cuda:0 both 10GiB and 20GiB; keep one"),
    ],
)
def test_an_option_that_contradicts_itself_is_refused(option, values, says, run_cli, tmp_path):
    """The last one used to win without a word."""
    options = [part for value in values for part in (option, value)]
    ended = run_cli("shard", "--profile", str(EXAMPLE), "--out", str(tmp_path / "plan.json"), *options)
    assert ended.returncode == 2
    assert says in " ".join(ended.stderr.split())
    assert not (tmp_path / "plan.json").exists()
