"""Sizes that the models share, and inputs of these: small, so that each is built and run within a second or so."""

from __future__ import annotations

import torch

BATCH = 2
"""Samples; makers look it up when they are called, as :func:`resize` may have changed it."""
TOKENS = 12
WIDTH = 32
"""Of the hidden state of transformers."""
CHANNELS = 1
"""How many times the channels of the networks of convolutions that have some of their own."""
VOCAB = 128
_padded = "last"

SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": VOCAB, **SIZE}
GROUPED = {**TEXT, "num_key_value_heads": 2}
VISION = {**SIZE, "image_size": 32, "patch_size": 8}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
SPEECH = {**SIZE, "vocab_size": 32, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)}


def resize(
    batch: int | None = None,
    *,
    width: int | None = None,
    channels: int | None = None,
    tokens: int | None = None,
    padded: str = "",
) -> None:
    """Have makers that are called from now on give other sizes, for benchmarks.

    Args:
        batch: samples.
        width: of the hidden state of transformers, with feed-forward layers four times as wide, where a maker has no
            width of its own.
        channels: how many times the channels of convolutions, where a maker looks it up (the models of
            benchmarks/pipeline.py do).
        tokens: of a text, where a maker does not need a length of its own.
        padded: ``"last"``: the last sample alone is padded, by a quarter; ``"each"``: every one, by a token.
    """
    global BATCH, TOKENS, WIDTH, CHANNELS, _padded
    if padded not in ("", "last", "each"):
        raise ValueError(f'padded={padded!r}; it is "last" or "each"')
    BATCH, TOKENS, _padded = batch or BATCH, tokens or TOKENS, padded or _padded
    WIDTH, CHANNELS = width or WIDTH, channels or CHANNELS
    if width:
        for sizes in (SIZE, TEXT, GROUPED, VISION):
            sizes.update(hidden_size=width, intermediate_size=4 * width)
        SEQ2SEQ.update(d_model=width, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width)


def token_ids(length: int | None = None) -> torch.Tensor:
    """Token ids, none of them a special one."""
    return torch.randint(8, VOCAB, (BATCH, length or TOKENS))


def padding_mask(length: int | None = None) -> torch.Tensor:
    """An attention mask with padding at the end; see :func:`resize` for which samples have some."""
    length = length or TOKENS
    mask = torch.ones(BATCH, length, dtype=torch.long)
    if _padded == "each":
        mask[:, -1] = 0
    else:
        mask[-1, -length // 4 :] = 0
    return mask


def image(size: int = 32, channels: int = 3) -> torch.Tensor:
    """Pictures, of ``size`` by ``size`` points."""
    return torch.randn(BATCH, channels, size, size)


def volume(size: int = 32) -> torch.Tensor:
    """Cubes of one channel."""
    return torch.randn(BATCH, 1, size, size, size)
