"""How well a profile tells a GPU: step, peak memory, and the roofline's estimates, on models of usual size.

Each model is profiled on one device as ``sw.profile`` does it, and planned for that device alone. Held against the
plan is the plain model, trained in this process before it is measured and after: steps enqueued one after another, as
in a training loop, each timed from its begin to the next one's by events, and the allocator's peak of one of them.
Where the processor sets the times,
its pace in the loop is told, as a multiple of that in the profile, and how far the step is off at that pace. The
estimates of units (forward and backward) are the roofline's with the catalogue's peaks: with the efficiencies that are
assumed where nothing was measured, and with those fitted to the units of the other models of the same run, never of
the model itself.

    python benchmarks/gpu.py                       # needs transformers and diffusers: make zoo
    python benchmarks/gpu.py --device cpu:0 --models tiny_gpt2,tiny_resnet,NetList    # without a GPU: no memory
"""

import argparse
import contextlib
import copy
import gc
import itertools
import os
import platform
import statistics
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

import shardwright as sw
from shardwright.profiler import collect
from shardwright.profiler.capture import captures_of
from shardwright.profiler.estimates.catalogue import model_of
from shardwright.profiler.estimates.estimate import ASSUMED, NOMINAL, demand_of, fit, roofline_s
from shardwright.profiler.estimates.on_gpu import as_on_gpu
from shardwright.profiler.estimates.workload import Mode, Workloads
from shardwright.profiler.measuring.optimizers import make_optimizer
from shardwright.profiler.measuring.pace import pace_of
from shardwright.profiler.recording.inputs import outputs_of
from shardwright.profiler.recording.structure import map_tensors
from shardwright.profiler.recording.unitgraph import mean_square_loss
from shardwright.profiler.target import load_target

ROOT = Path(__file__).parents[1]
MODELS = (
    "resnet50,convnext,vit,swin,bert,gpt2,llama,llama_bf16,mixtral,t5,whisper,unet_2d,NetDict,tiny_gpt2,tiny_resnet,"
    "tiny_llama"
)


def resnet50():
    """Images of ImageNet's size."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000)), (torch.randn(32, 3, 224, 224),), {}


def convnext():
    """The tiny one."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(ConvNextConfig(num_labels=1000)), (torch.randn(16, 3, 224, 224),), {}


def vit():
    """The base one, which has 86 million parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=1000)), (torch.randn(16, 3, 224, 224),), {}


def swin():
    """The tiny one."""
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(SwinConfig(num_labels=1000)), (torch.randn(16, 3, 224, 224),), {}


def bert():
    """The base one."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig()), (torch.randint(0, 30000, (8, 256)),), {}


def gpt2():
    """The small one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(use_cache=False)), (torch.randint(0, 50000, (4, 512)),), {}


def llama():
    """Eight layers of 1024."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config), (torch.randint(0, 8000, (2, 1024)),), {}


def llama_bf16():
    """The same in bfloat16."""
    model, args, kwargs = llama()
    return model.bfloat16(), args, kwargs


def mixtral():
    """Eight experts a layer, of which each token takes two."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    return MixtralForCausalLM(config), (torch.randint(0, 8000, (4, 512)),), {}


def t5():
    """The small one."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(use_cache=False, decoder_start_token_id=0))
    ids = torch.randint(2, 32000, (8, 256))
    return model, (), {"input_ids": ids, "decoder_input_ids": ids.clone()}


def whisper():
    """The tiny one on 30 seconds of sound."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sound, text = torch.randn(8, 80, 3000), torch.randint(0, 50000, (8, 64))
    model = WhisperForConditionalGeneration(WhisperConfig(use_cache=False))
    return model, (), {"input_features": sound, "decoder_input_ids": text}


def unet_2d():
    """Diffusion at 64 x 64."""
    from diffusers import UNet2DModel

    model = UNet2DModel(sample_size=64, block_out_channels=(128, 256, 256, 512), layers_per_block=2)
    return model, (torch.randn(8, 3, 64, 64), torch.randint(0, 1000, (8,))), {"return_dict": False}


def makers():
    """What makes a model and the arguments of its forward, by name; ``tiny_`` ones are the zoo's."""
    sys.path.append(str(ROOT / "tests"))
    import zoo

    def container(name):
        model, (args, kwargs) = load_target(f"{ROOT / 'examples' / 'containers.py'}:{name}")
        return model, args, kwargs

    found = {f"tiny_{name}": entry.make for name, entry in zoo.ZOO.items()}
    found |= {name: lambda name=name: container(name) for name in ("Net", "NetList", "NetDict")}
    own = (resnet50, convnext, vit, swin, bert, gpt2, llama, llama_bf16, mixtral, t5, whisper, unet_2d)
    return found | {make.__name__: make for make in own}


def clock(device):
    """A function that marks a moment in the device's work, and one that gives the seconds between two marks."""
    if device.type == "cpu":
        return time.perf_counter, lambda first, second: second - first

    def mark():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda first, second: first.elapsed_time(second) / 1e3


def trained(model, args, kwargs, places, device, steps):
    """Seconds of each of so many steps of the plain model, its peak memory in bytes, None on a CPU, and the pace."""
    mark, between = clock(device)
    is_gpu = device.type == "cuda"
    if is_gpu:  # libraries take their workspaces, which a plan leaves room for apart
        nn.Linear(64, 64, device=device)(torch.randn(64, 64, device=device)).sum().backward()
    before = torch.cuda.memory_allocated() if is_gpu else 0
    model = copy.deepcopy(model).to(device).train()
    args, kwargs = map_tensors(lambda t: t.to(device), (args, kwargs))
    optimizer = make_optimizer("adam", model.parameters())

    def step():
        outputs = outputs_of(model(*args, **kwargs))
        mean_square_loss([outputs[place] for place in places]).backward()
        del outputs
        optimizer.step()

    def zeroed():
        optimizer.zero_grad()
        step()

    for _ in range(3):
        zeroed()
    pace = pace_of(device)
    paces, marks = [pace()], [mark()]
    for _ in range(steps):
        zeroed()
        marks.append(mark())
    peak = None
    paces.append(pace())
    if is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()  # with gradients from before, as the second of several micro-batches has them
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    return [between(first, second) for first, second in itertools.pairwise(marks)], peak, statistics.fmean(paces)


def unit_times(capture, profile, device):
    """Kind, demand and measured seconds of the forward and the backward of each step that computes."""
    measured = {m.node: m for m in profile.measurements if m.microbatches == 1}
    workloads = Workloads()
    rows = []
    for step in capture.steps:
        if step.call is None or step.name not in measured:
            continue
        workload = workloads.of(step.call, Mode(train=True, kind=device.type))
        for operations, seconds in (
            (workload.forward, measured[step.name].forward_s),
            (workload.backward, measured[step.name].backward_s),
        ):
            demand = demand_of(as_on_gpu(operations) if device.type == "cuda" else operations)
            if len(demand.flops) and seconds > 0:
                rows.append((step.kind, demand, seconds))
    return rows


@contextlib.contextmanager
def after_capture(function):
    """Call ``function`` with what a profile captured before it measures, and give what it returns in the list."""
    found = []

    def captured(*args, **kwargs):
        captures = captures_of(*args, **kwargs)
        found.append(function(captures[0]))
        return captures

    collect.captures_of = captured
    try:
        yield found
    finally:
        collect.captures_of = captures_of


def one(name, make, device, options):
    """Print a model's row; the times of its units, the errors of step and memory in percent."""
    torch.manual_seed(0)
    model, args, kwargs = make()

    def loop(captures):
        begin = time.perf_counter()
        found = trained(model, args, kwargs, captures[1].output_places, device, options.steps)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return captures, found, time.perf_counter() - begin

    began = time.perf_counter()
    with after_capture(loop) as found:
        profile = sw.profile(
            model, args, kwargs, devices=[options.device], microbatches=[1], rounds=options.rounds, refresh=True
        )
    ((captures, before, trained_s),) = found
    took = time.perf_counter() - began - trained_s
    plan = sw.plan(profile, microbatches=1)
    stage = plan.stages[0]
    predicted = stage.forward_s + stage.backward_s + stage.update_s
    after = loop(captures)[1]
    times, peak, pace_s = before[0] + after[0], after[1], statistics.fmean((before[2], after[2]))
    low, step, high = statistics.quantiles(times, n=4)
    slower = pace_s / plan.paces[options.device] if options.device in plan.paces else 1.0
    memory_error = 100 * (stage.memory_bytes / peak - 1) if peak else 0.0
    errors = [100 * (predicted / step - 1), memory_error, 100 * (slower * predicted / step - 1)]
    memory = f"{stage.memory_bytes / 2**20:.0f} MiB | {peak / 2**20:.0f} MiB ({errors[1]:+.1f}%)" if peak else "| "
    units = sum(node.kind == "unit" for node in profile.nodes)
    print(
        f"| {name} | {units} | {1e3 * predicted:.2f} ms | {1e3 * step:.2f} ms, {1e3 * low:.2f} to {1e3 * high:.2f} "
        f"({errors[0]:+.1f}%) | {slower:.3f}, {errors[2]:+.1f}% | {memory} | {took:.1f} s |",
        flush=True,
    )
    return unit_times(captures[1], profile, device), errors


def print_rooflines(rows, rates):
    """A row a model: estimated over measured time of its units, not fitted and fitted to the other models."""
    print("| model | times | assumed: median, worst, of the sum | fitted to the others: median, worst, of the sum |")
    print("|---|---|---|---|")
    every = {"assumed": [], "fitted": []}
    for name, own in rows.items():
        others = [row for other, theirs in rows.items() if other != name for row in theirs]
        ways = {"assumed": ASSUMED}
        if others:
            ways["fitted"] = fit([d for _, d, _ in others], [s for _, _, s in others], rates).efficiency
        cells = []
        for way, efficiency in ways.items():
            pairs = [(kind, roofline_s(demand, rates, efficiency), seconds) for kind, demand, seconds in own]
            ratios = [estimated / seconds for kind, estimated, seconds in pairs if kind == "unit"]
            total = sum(estimated for _, estimated, _ in pairs) / sum(seconds for _, _, seconds in pairs)
            every[way] += ratios
            cells.append(f"{statistics.median(ratios):.2f}, {_worst(ratios):.2f}, {total:.2f}")
        print(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    for way, ratios in every.items():
        if ratios:
            off = sorted(abs(ratio - 1) for ratio in ratios)
            print(
                f"{way}: {100 * statistics.median(off):.0f}% off for the median of {len(ratios)} times, "
                f"{sum(part <= 0.3 for part in off) / len(off):.0%} of them within 30%"
            )


def _worst(ratios):
    """The ratio that is furthest from 1."""
    return max(ratios, key=lambda ratio: max(ratio, 1 / ratio))


def main():
    """Print a row a model, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--steps", type=int, default=30, help="of the plain model")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further model is begun")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    is_gpu = options.device.startswith("cuda")
    device = torch.device(options.device if is_gpu else "cpu")
    if not is_gpu:
        torch.set_num_threads(1)
    found = model_of(torch.cuda.get_device_name(device)) if is_gpu else None
    rates = found or NOMINAL
    print(
        "| model | units | step predicted | measured | pace, off then | peak predicted | measured | profiled in |\n"
        + "|---" * 8
        + "|"
    )
    rows, errors = {}, []
    known = makers()
    began = time.monotonic()
    for name in options.models.split(","):
        if time.monotonic() - began > options.seconds:
            break
        try:
            rows[name], error = one(name, known[name], device, options)
            errors.append(error)
        except (ImportError, sw.ShardwrightError) as refused:
            print(f"| {name} | | {refused} | | | | | |", flush=True)
        gc.collect()
        if is_gpu:
            torch.cuda.empty_cache()
    for what, column in (("step", 0), ("step at the pace of the loop", 2), ("peak memory", 1)):
        off = [abs(error[column]) for error in errors]
        if any(off):
            print(
                f"{what}: {statistics.median(off):.1f}% off for the median of {len(off)} models, "
                f"{max(off):.1f}% at worst"
            )
    print_rooflines(rows, rates)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {profile_name(device)}")
    print(f"{datetime.now(UTC):%Y-%m-%d}")


def profile_name(device):
    """What the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


if __name__ == "__main__":
    main()
