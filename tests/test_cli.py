"""The command line: the main job end to end on a small model, and every mistake as one clear line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import networkx as nx
import pandas
import pytest

import shardwright as sw

ROOT = Path(__file__).parents[1]

NETS = """
import torch
from torch import nn

class Small(nn.Sequential):
    def __init__(self, width=64):
        super().__init__(*[nn.Linear(width, width) for _ in range(6)])

    @staticmethod
    def sample_inputs():
        return (torch.randn(8, 64),)

class Other(Small):
    pass

class Failing(Small):
    def forward(self, x):
        raise RuntimeError("not today")

class Leaving(Small):
    def forward(self, x):
        raise SystemExit(3)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    (path / "nets.py").write_text(NETS)
    return path


@pytest.fixture(scope="module")
def profiled(folder, run_cli):
    """The folder after `profile` has run in it."""
    done = run_cli(
        "profile", "nets.py:Small", "--devices", "cpu:0,cpu:1", "--out", "small.profile.json", "--microbatches", "1,4",
        "--rounds", "2", "--csv", "small.csv", "--parquet", "small.parquet", "--graphml", "small.graphml",
        cwd=folder, in_process=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nets.py:Small" in done.stdout
    return folder


def test_profile_measures_everything(profiled):
    """The profile holds each unit on each device at each number of micro-batches, and the links both ways."""
    profile = json.loads((profiled / "small.profile.json").read_text())
    rows = {(m["node"], m["device"], m["microbatches"]) for m in profile["measurements"]}
    units = [str(i) for i in range(6)]
    assert {(u, d, m) for u in units for d in ("cpu:0", "cpu:1") for m in (1, 4)} <= rows
    assert all(m["forward_s"] > 0 for m in profile["measurements"] if m["node"] in units)
    assert any(m["backward_s"] > 0 for m in profile["measurements"] if m["node"] in units)  # less an empty one
    assert {(link["source"], link["target"]) for link in profile["links"]} == {("cpu:0", "cpu:1"), ("cpu:1", "cpu:0")}
    first = next(n for n in profile["nodes"] if n["name"] == "0")
    weights = 64 * 65 * 4
    assert (first["param_bytes"], first["grad_bytes"]) == (weights, weights)
    assert 2 * weights <= first["optimizer_bytes"] <= 2 * weights + 16
    assert first["output_bytes"] == {"1": 8 * 64 * 4, "4": 2 * 64 * 4}


def test_shard_plans_runs_and_reports(profiled, run_cli):
    """With --run, shard plans, runs the plan over two workers and shows predicted beside measured."""
    done = run_cli(
        "shard", "nets.py:Small", "--profile", "small.profile.json", "--out", "small.plan.json", "--microbatches", "4",
        "--run", "--steps", "2", "--run-out", "small.run.json", "--trace", "small.trace.json",
        cwd=profiled, in_process=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "lower bound" in done.stdout
    assert "redicted" in done.stdout
    run = json.loads((profiled / "small.run.json").read_text())
    assert run["equality"]["gradients"] <= 1e-5
    assert [naive["name"] for naive in run["naive"]] == ["equal count", "by parameters"]
    assert "Naive splits" in done.stdout
    trace = json.loads((profiled / "small.trace.json").read_text())
    assert {event["name"] for event in trace["traceEvents"]} >= {"F0", "F3", "B0", "B3", "update"}
    for name in ("small.profile.json", "small.plan.json", "small.run.json"):
        again = run_cli("report", name, cwd=profiled, in_process=True)
        assert again.returncode == 0
        assert again.stdout.strip() in done.stdout or name == "small.profile.json"
    again = run_cli("report", "small.run.json", "--trace", "again.trace.json", cwd=profiled, in_process=True)
    assert again.returncode == 0, again.stderr
    assert json.loads((profiled / "again.trace.json").read_text()) == trace
    assert "Wrote again.trace.json: open it at https://ui.perfetto.dev." in again.stdout
    refused = run_cli("report", "small.profile.json", "--trace", "again.trace.json", cwd=profiled, in_process=True)
    assert refused.returncode == 2
    assert "small.profile.json is neither a plan nor a run; --trace" in refused.stderr.replace("\n", " ")
    checked = run_cli("verify", "nets.py:Small", "--plan", "small.plan.json", cwd=profiled, in_process=True)
    assert checked.returncode == 0, checked.stderr
    assert "verified" in checked.stdout


def test_a_plan_s_timeline_is_written_without_a_run(profiled, run_cli):
    """By ``shard`` and from the file alike; where there is none, ``shard`` says so and goes on, or refuses first."""
    shard = ("shard", "--profile", "small.profile.json", "--microbatches", "4", "--out", "split.plan.json")
    options = {"cwd": profiled, "in_process": True}
    made = run_cli(*shard, "--pin", "0=cpu:0", "--pin", "5=cpu:1", "--trace", "split.trace.json", **options)
    assert made.returncode == 0, made.stderr
    assert "Wrote split.trace.json: open it at https://ui.perfetto.dev." in made.stdout
    trace = (profiled / "split.trace.json").read_text()
    assert {event["name"] for event in json.loads(trace)["traceEvents"]} >= {"F0", "B3", "memory of cpu:1"}
    again = run_cli("report", "split.plan.json", "--trace", "again.trace.json", **options)
    assert again.returncode == 0, again.stderr
    assert (profiled / "again.trace.json").read_text() == trace
    alone = run_cli(*shard, "--devices", "cpu:0", "--trace", "none.trace.json", **options)
    assert alone.returncode == 0, alone.stderr
    assert "Wrote no none.trace.json: the plan is the model on cpu:0 alone" in alone.stdout
    refused = run_cli(*shard, "--free", "--trace", "none.trace.json", **options)
    assert refused.returncode == 2
    assert "--trace is of a timeline, which a free assignment does not have" in refused.stderr.replace("\n", " ")
    assert not (profiled / "none.trace.json").exists()


@pytest.mark.slow
def test_the_main_job_as_users_start_it(folder, run_cli):
    """Two commands, each a process of its own with workers that begin as users' do."""
    made = ("--devices", "cpu:0,cpu:1", "--out", "whole.profile.json", "--microbatches", "1,4", "--rounds", "2")
    used = ("--profile", "whole.profile.json", "--out", "whole.plan.json", "--microbatches", "4", "--run")
    for arguments in (
        ("profile", "nets.py:Small", *made),
        ("shard", "nets.py:Small", *used, "--steps", "2", "--run-out", "whole.run.json"),
    ):
        done = run_cli(*arguments, cwd=folder, timeout=120)
        assert done.returncode == 0, done.stderr
    assert json.loads((folder / "whole.run.json").read_text())["equality"]["gradients"] <= 1e-5


COSTS = {
    "format": "shardwright.costs",
    "version": 1,
    "microbatches": 8,
    "devices": {"cuda:0": {}, "cuda:1": {}},
    "units": [{"name": name, "forward_s": 1e-3, "backward_s": 2e-3} for name in ("body", "head")],
}


def test_a_profile_is_exported_when_it_is_made_and_later(profiled, run_cli):
    """The tables and the graph that `profile` wrote are those that `report` makes of its file, without the model."""
    names = ("small.csv", "small.parquet", "small.graphml")
    again = {name: f"again.{name}" for name in names}
    options = [part for name in names for part in (f"--{name.rpartition('.')[2]}", again[name])]
    done = run_cli("report", "small.profile.json", *options, cwd=profiled, in_process=True)
    assert done.returncode == 0, done.stderr
    assert "Wrote again.small.csv, again.small.parquet, again.small.graphml." in done.stdout
    for name in names:
        assert (profiled / name).read_bytes() == (profiled / again[name]).read_bytes()
    frame = pandas.read_csv(profiled / "small.csv")
    assert set(frame.microbatches) == {1, 4}
    graph = nx.read_graphml(profiled / "small.graphml")
    assert graph.graph["microbatches"] == 4
    expected = sw.plan(sw.Profile.load(profiled / "small.profile.json"), microbatches=4)
    assert sw.plan(graph, microbatches=4).stages == expected.stages


def test_a_saved_profile_is_planned_without_its_model(profiled, run_cli):
    """Planning needs no target: the plan is the same, and is named after the profile."""
    for arguments in (["nets.py:Small"], []):
        done = run_cli("shard", *arguments, "--profile", "small.profile.json", cwd=profiled, in_process=True)
        assert done.returncode == 0, done.stderr
        assert "Wrote small.plan.json." in done.stdout
        plan = sw.Plan.load(profiled / "small.plan.json")
        assert (plan.model, plan.of_model) == ("nets.py:Small", True)
        (profiled / "small.plan.json").unlink()


def test_costs_are_planned_shown_and_exported(profiled, run_cli):
    """Costs by hand are taken wherever a profile is."""
    (profiled / "costs.json").write_text(json.dumps(COSTS))
    asked = ("--out", "by-hand.plan.json", "--replans", "2")
    planned = run_cli("shard", "--profile", "costs.json", *asked, cwd=profiled, in_process=True)
    assert planned.returncode == 0, planned.stderr
    assert "Not planned anew: costs.json does not say how sure its times are." in planned.stdout
    assert sw.Plan.load(profiled / "by-hand.plan.json").placement() == {"body": "cuda:0", "head": "cuda:1"}
    shown = run_cli("report", "costs.json", "--graphml", "costs.graphml", cwd=profiled, in_process=True)
    assert "costs as given, of no model" in shown.stdout
    assert sw.plan(nx.read_graphml(profiled / "costs.graphml")).devices == ("cuda:0", "cuda:1")
    refused = run_cli("report", "by-hand.plan.json", "--csv", "t.csv", cwd=profiled, in_process=True)
    assert refused.returncode == 2
    assert "by-hand.plan.json is a plan; --csv, --parquet and --graphml are for a profile" in refused.stderr


def test_missing_pyarrow_is_told_before_the_measurement(folder, run_cli, monkeypatch):
    """Nothing is measured for a table that could not be written."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    arguments = ["profile", "nets.py:Small", "--parquet", "t.parquet", "--out", "never.json"]
    done = run_cli(*arguments, cwd=folder, in_process=True)
    assert done.returncode == 2
    assert "Parquet needs pyarrow" in done.stderr
    assert not (folder / "never.json").exists()


SPLIT = ["shard", "nets.py:Small", "--profile", "small.profile.json", "--microbatches", "4"]
# fmt: off
MISTAKES = [
    (["profile", "absent.py:Net"], "there is no file absent.py"),
    (["profile", "nets.py:Absent"], "has no Absent; its models are Small, Other, Failing, Leaving"),
    (["profile", "nets.py:Leaving"], "failed on the sample inputs, at nets.py:22: SystemExit: 3"),
    (["profile", "nets.py:Failing"], "the sample inputs, at nets.py:18: RuntimeError: not today"),
    (["profile", "nets.py:Small", "--devices", "gpu:0"], "'gpu:0' is not a device"),
    (["profile", "nets.py:Small", "--devices", "cuda:99"], "there is no cuda:99"),
    (["profile", "nets.py:Small", "--microbatches", "3"], "a batch of 8 cannot be divided into 3"),
    (["profile", "nets.py:Small", "--microbatches", "two"], "--microbatches 'two' is not a list"),
    (["profile", "nets.py:Small", "--optimizer", "lion"], "optimizer 'lion' is not known"),
    (["profile", "nets.py:Small", "--set", "width"], "--set 'width' is not KEY=VALUE"),
    (["profile", "nets.py:Small", "--set", "depth=2"], "Small(depth=2) failed: TypeError"),
    (["profile", "nets.py:Small", "--input", "8by4"], "cannot read input '8by4'"),
    (["profile", "nets.py:Small", "--input", "8x65"], "the forward of Small failed in unit 0"),
    (["shard", "nets.py:Small", "--profile", "absent.json"], "there is no absent.json: make it with `profile"),
    (["shard", "nets.py:Other", "--profile", "small.profile.json"], "is of nets.py:Small, not of nets.py:Other"),
    (["shard", "nets.py:Small", "--profile", "half.json"], "half.json is not complete JSON"),
    (["shard", "nets.py:Small", "--profile", "newer.json"], "profile version 99; this shardwright reads up to 1"),
    (["shard", "nets.py:Small", "--profile", "nets.py"], "nets.py is neither a profile nor costs: it is no JSON"),
    (["shard", "nets.py:Small", "--profile", "other.json"], "other.json is neither a profile nor costs: it is"),
    (["shard", "nets.py:Small", "--profile", "small.profile.json", "--microbatches", "8"], "no times at 8"),
    (["shard", "nets.py:Small", "--profile", "small.profile.json", "--memory", "cuda:0=1GiB"], "unknown device cuda:0"),
    (["shard", "nets.py:Small", "--profile", "small.profile.json", "--memory", "cpu:0=lots"], "'lots' is not a size"),
    (["profile", "nets.py:Small", "--out", "no/such/p.json"], "cannot write no/such/p.json"),
    (["profile", "nets.py:Small", "--devices", ","], "no device is named"),
    (["profile", "nets.py:Small", "--input", "0x64"], "a dimension of 0"),
    (["shard", "nets.py:Small", "--profile", "small.profile.json", "--microbatches", "1,4"], "a plan has one number"),
    (["shard", "nets.py:Small", "--profile", "small.profile.json", "--schedule", "zb"], "schedule 'zb' is not known"),
    (["shard", "nets.py:Small", "--profile", "small.profile.json", "--pin", "head=cpu:0"], "no unit matches 'head'"),
    (["shard", "nets.py:Small", "--profile", "small.profile.json", "--devices", "cpu:7"], "unknown device cpu:7"),
    (["shard", "nets.py:Small", "--profile", "small.profile.json", "--out", "no/such/plan"], "cannot write no/such"),
    (
        [*SPLIT, "--run", "--set", "width=32", "--input", "8x32"],
        "shapes of parameters differ",
    ),
    (
        [*SPLIT, "--run", "--input", "16x64"],
        "for inputs float32 8x64; these are float32 16x64",
    ),
    ([*SPLIT, "--set", "width=32", "--input", "8x32"], "shapes of parameters differ"),
    ([*SPLIT, "--input", "16x64"], "for inputs float32 8x64; these are float32 16x64"),
    ([*SPLIT, "--time-limit", "-1"], "Invalid value for '--time-limit'"),
    ([*SPLIT, "--nope"], "No such option: --nope"),
    (["verify"], "Missing argument 'TARGET'; see"),
    ([*SPLIT, "--microbatches", "x"], "'x' is not a positive whole number, or auto"),
    ([*SPLIT, "--out", "."], "cannot write .: it is a folder; choose a file in it"),
    (["verify", "nets.py:Small", "--plan", "small.profile.json"], "is not a plan: its format is 'shardwright.profile'"),
    (["report", "absent.json"], "cannot read absent.json: No such file"),
    (["shard"], "nothing to plan: give TARGET, or --profile FILE with a profile or costs"),
    (["shard", "--profile", "absent.json"], "there is no absent.json: give a profile or costs"),
    (["shard", "--profile", "costs.json", "--run"], "costs.json holds costs, with no model that --run could run"),
    (["shard", "nets.py:Small", "--profile", "costs.json"], "is of costs, not of nets.py:Small"),
    ([*SPLIT, "--free", "--run"], "--run needs a chain of stages, which --free and --objective latency do not make"),
    ([*SPLIT, "--objective", "latency", "--run"], "leave it out, and place the plan with sw.place"),
    ([*SPLIT, "--replicas", "two"], "--replicas 'two' is neither a positive whole number nor auto"),
    ([*SPLIT, "--replicas", "3"], "3 replicas need a device each, and there are 2: ask for fewer"),
    ([*SPLIT, "--objective", "beauty"], "objective 'beauty' is not known; the planner has: throughput, latency,"),
    (["shard", "--profile", "costs.json", "--microbatches", "4"], "are of 8 micro-batches, not of 4: give"),
    (["shard", "--profile", "small.profile.json", "--run"], "--run needs the model: give TARGET and its profile"),
    (["report", "small.profile.json", "--csv", "no/such/t.csv"], "cannot write no/such/t.csv"),
    (["report", "small.profile.json", "--graphml", "g.graphml", "--microbatches", "3"], "profile.json has 1, 4; give"),
    (["report", "small.profile.json", "--microbatches", "4"], "--microbatches 4 is for the graph: give --graphml"),
    (["profile", "nets.py:Small", "--parquet", "no/such/t.parquet"], "cannot write no/such/t.parquet"),
    (["schema", "graph"], "'graph' is not a kind of file"),
]
# fmt: on


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_clear_line(profiled, run_cli, arguments, message):
    """Exit code 2, one line that names the mistake, no traceback."""
    text = (profiled / "small.profile.json").read_text()
    (profiled / "half.json").write_text(text[: len(text) // 2])
    (profiled / "newer.json").write_text(text.replace('"version": 1', '"version": 99', 1))
    (profiled / "other.json").write_text("{}")
    (profiled / "costs.json").write_text(json.dumps(COSTS))
    done = run_cli(*arguments, cwd=profiled, in_process=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(profiled.glob(".*.tmp"))


def test_debug_shows_the_traceback(folder, run_cli):
    """--debug, anywhere on the line, adds the traceback."""
    done = run_cli("profile", "absent.py:Net", "--debug", cwd=folder, in_process=True)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "there is no file absent.py" in done.stderr


def test_planning_imports_nothing_slow(profiled, run_cli):
    """Without --run, shard plans from the file alone; networkx takes longer to import than a plan to make."""
    program = (
        "import sys\nfrom shardwright.cli import main\n"
        "try:\n    main(['shard', 'nets.py:Small', '--profile', 'small.profile.json'])\n"
        "except SystemExit as error:\n    assert not error.code, error.code\n"
        "slow = {'torch', 'pandas', 'networkx'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = run_cli.python("-c", program, cwd=profiled)
    assert done.returncode == 0, done.stderr


def test_version_and_help(run_cli):
    """The version is printed; without a command the help is."""
    assert run_cli("--version").stdout.startswith("shardwright 0.")
    assert "profile" in run_cli("--help").stdout


def test_ctrl_c_ends_everything(folder):
    """An interrupted profile leaves no process and no file, says so, and exits with 130."""
    command = [
        sys.executable,
        str(ROOT / "cli.py"),
        "profile",
        "nets.py:Small",
        *("--rounds", "100000", "--precision", "0", "--refresh"),
        "--out",
        "never.json",
    ]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        workers = []
        while len(workers) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; nothing was written" in errors
    assert "Traceback" not in errors
    assert not (folder / "never.json").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
