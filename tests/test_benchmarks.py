"""Benchmarks run to their last line: each with the least that it can be asked for."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.errors import ShardwrightError

FOLDER = Path(__file__).parents[1] / "benchmarks"

ASSEMBLY_LINE = "4\n3\n2\n4\n3\n1,2\n1,3\n2,4\n3,4\n-1,-1\n"
"""Four tasks of 12 seconds in all, the first before two that are side by side."""

QUICK = {
    "capture": ("--layers 1 --tokens 16", "captured in"),
    "memory": ("--models mlp --microbatches 1", "1 of 1 models within 3%"),
    "planner": ("--quick --only little --time-limit 2", "largest gap"),
    "steps": ("--graphs 1 --units 6 --microbatches 2", "| 1, 3 | 2 |"),
    "schedule": ("--stages 4 --microbatches 20 --plain 8x20", "| zero-bubble | overlapped |"),
}
SLOW = {
    "clocks": ("--device cpu:0 --models tiny_gpt2 --rounds 1 --steps 2", "| loop after, drained |"),
    "inprocess": ("--layers 2 --batch 4 --tokens 8 --width 32 --rounds 2 --microbatches 2", "| pipelined, 2 micro-"),
    "links": ("--rounds 2 --steps 1 --products 1", "| 4 MiB |"),
    "messages": ("--rows 2 --width 8 --layers 1 --steps 2", "| 1f1b | 16 |"),
    "pipeline": ("--models hand_mixer --microbatches 2 --modes infer --steps 1 --samples 8", "1 runs: step"),
    "placement": ("--devices cpu,cpu --seconds 0.1 --copies 1", "| chain | shardwright |"),
    "prediction": ("--times 1 --networks Net", "| Net |"),
    "profile_accuracy": ("--models tied_autoencoder --rounds 1", "1 models: "),
    "roofline": ("--rounds 1 --calibration Net", "all: median"),
}


def output_of(name, options, folder):
    """What it prints; it ends well."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    environment = os.environ | {"SHARDWRIGHT_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", QUICK)
def test_it_runs_to_its_last_line(name, tmp_path):
    """It prints what it is for, and ends."""
    options, printed = QUICK[name]
    assert printed in output_of(name, options.split(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_it_measures_to_its_last_line(name, tmp_path):
    """So do those that take their time."""
    pytest.importorskip("transformers")  # of which some models are
    options, printed = SLOW[name]
    assert printed in output_of(name, options.split(), tmp_path)


def test_published_instances_are_read_and_solved(tmp_path):
    """Of four tasks that take 12 seconds two stations can have 5 and 7 at best."""
    (tmp_path / "line.IN2").write_text(ASSEMBLY_LINE)
    assert "| line | 4 | 2 | 7 | 7 | exact |" in output_of("published", ["line.IN2", "--devices", "2"], tmp_path)


def test_published_graphs_for_training_are_read(tmp_path):
    """Three layers that take 3, 5 and 4 there and back, on two accelerators: 8 and 4, and a transfer each way."""
    nodes, edges = [], []
    for number, (forward, backward) in enumerate([(1, 2), (2, 3), (2, 2)], start=1):
        for of_backward, seconds in ((0, forward), (1, backward)):
            node = {"id": number + 3 * of_backward, "colorClass": number, "isBackwardNode": of_backward, "size": 1}
            nodes.append(node | {"supportedOnFpga": 1, "fpgaLatency": seconds, "cpuLatency": 99})
    for first, second in ((1, 2), (2, 3), (4, 5), (5, 6)):
        edges.append({"sourceId": first, "destId": second, "cost": 0.25})
    graph = {"maxSizePerFPGA": 1e9, "maxFPGAs": 2, "maxCPUs": 1, "nodes": nodes, "edges": edges}
    (tmp_path / "layers.json").write_text(json.dumps(graph))
    # 3 | 5, 4 would be 9.5: a tensor goes out, and its gradient comes in.
    assert "| layers | 3 | 3 | 8.5 | 8.5 | exact |" in output_of("published", ["layers.json"], tmp_path)
    edges[-1]["cost"] = 0.5
    with pytest.raises(ShardwrightError, match="where gradients go and take as long"):
        runpy.run_path(str(FOLDER / "published.py"))["accelerators"](graph)


def test_each_benchmark_is_run_here():
    """But that for a GPU."""
    every = {path.stem for path in FOLDER.glob("*.py")}
    assert every == {*QUICK, *SLOW, "published", "gpu"}
