"""How long the capture of a model takes that no machine here could hold: a Llama of 70 billion parameters.

It is built and run on fake tensors, which have shapes and no values.

    python benchmarks/capture.py --layers 80 --tokens 4096    # needs transformers: make zoo
"""

import argparse
import resource
import time
from datetime import UTC, datetime

import torch
from torch._subclasses import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright.profiler.trace import trace


def main() -> None:
    """Print seconds and bytes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=options.layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype=torch.bfloat16,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LlamaForCausalLM(config)
        built = time.perf_counter()
        capture = trace(model, (), {"input_ids": torch.randint(0, 128256, (1, options.tokens))})
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    print(f"{billions:.1f} billion parameters, {options.tokens} tokens: {len(capture.steps)} steps, no obstacle")
    assert not capture.obstacles
    print(f"built in {built - start:.1f} s, captured in {end - built:.1f} s")
    print(f"peak memory {peak / 1e9:.2f} GB, {before / 1e9:.2f} GB of it the imported libraries")
    print(f"torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
