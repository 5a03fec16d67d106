"""The example of a training script, and a script under torchrun."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import on_ranks, workers

import shardwright as sw
from shardwright.profiler.target import load_target

__all__ = ["workers"]  # fixtures


ROOT = Path(__file__).parents[1]


LM = ROOT / "examples" / "train_lm.py"


def read_lines(text):
    """Step -> loss of what the example prints."""
    lines = [line.split() for line in text.splitlines() if line.startswith("step ")]
    return {int(step): float(loss) for _, step, _, loss in lines}


def example(**sizes):
    """The example's module, with other sizes."""
    model, _ = load_target(f"{LM}:CharacterModel")
    module = sys.modules[type(model).__module__]
    for name, size in ({"LAYERS": 6, "LENGTH": 64} | sizes).items():
        setattr(module, name, size)
    return module


SMALL = {"LAYERS": 3, "LENGTH": 16}


def example_trained(plan, steps, resume, save):
    """In a rank: what the example prints."""
    module = example(**SMALL)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if plan is None:
            module.train_whole(steps)
        else:
            module.train(plan, steps, resume, save)
    return printed.getvalue()


def test_the_example_goes_on_with_more_stages(workers, captured_profile, tmp_path):
    """A language model on real text: two stages, then three, have the unsharded model's curve, and it learns."""
    model = example(**SMALL).CharacterModel()
    args, plans = model.sample_inputs(), {}
    for count in (2, 3):
        devices = [f"cpu:{i}" for i in range(count)]
        profile = captured_profile(model, args, devices=devices, microbatches=(1, 4), optimizer="adamw")
        plans[count] = sw.plan(profile, microbatches=4)
        assert len(plans[count].stages) == count
    first = on_ranks(workers, 2, example_trained, plans[2], 3, None, tmp_path)
    second = on_ranks(workers, 3, example_trained, plans[3], 3, tmp_path, None)
    expected = read_lines(on_ranks(workers, 1, example_trained, None, 6, None, None)[0])
    assert expected[5] < expected[0] - 0.5
    assert read_lines(first[0]) | read_lines(second[0]) == pytest.approx(expected, rel=1e-5)


def launched(folder, *arguments):
    """What a script started by torchrun prints and says, with its exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.slow
def test_a_script_under_torchrun(captured_profile, tmp_path):
    """The example as its users start it; and when the loss of one rank raises, both ranks end and say why."""
    model = example().CharacterModel()
    plan = sw.plan(
        captured_profile(model, model.sample_inputs(), microbatches=(1, 4), optimizer="adamw"), microbatches=4
    )
    plan.save(tmp_path / "lm.plan.json")
    result = launched(tmp_path, LM, "--plan", "lm.plan.json", "--steps", "3")
    assert result.returncode == 0, result.stderr
    assert len(read_lines(result.stdout)) == 3
    (tmp_path / "raising.py").write_text(
        f"import sys; sys.path.insert(0, {str(LM.parent)!r})\n"
        "import train_lm\n"
        "def loss(logits, target): raise ValueError('no luck')\n"
        "train_lm.loss_of = loss\n"
        "train_lm.main()\n"
    )
    result = launched(tmp_path, "raising.py", "--plan", "lm.plan.json", "--steps", "3")
    assert result.returncode != 0
    assert "[rank1]: shardwright.errors.ShardwrightError: stage 1 on cpu:1 failed: ValueError: no luck" in result.stderr
