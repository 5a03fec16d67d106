"""Written by hand with torch: chains, and its own transformer."""

from __future__ import annotations

import torch
from torch import nn

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import padding_mask


@entry("torch")
def mlp():
    """A Sequential of Sequentials."""
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.1)) for _ in range(4)]
    return (
        nn.Sequential(nn.Linear(16, 32), nn.Sequential(*blocks), nn.Linear(32, 4)),
        (torch.randn(sizes.BATCH, 16),),
        {},
    )


@entry("torch")
def torch_transformer():
    model = nn.Transformer(32, 4, 3, 3, 64, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(8)
    kwargs = {"tgt_mask": causal, "src_key_padding_mask": padding_mask() == 0}
    return model, (torch.randn(sizes.BATCH, 12, 32), torch.randn(sizes.BATCH, 8, 32)), kwargs


@entry("torch")
def torch_encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(32), enable_nested_tensor=False)
    return model, (torch.randn(sizes.BATCH, 12, 32),), {}
