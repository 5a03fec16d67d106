"""Models of x-transformers."""

from __future__ import annotations

import torch

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import VOCAB, image, padding_mask, token_ids


@entry("x-transformers")
def x_decoder():
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=sizes.WIDTH, depth=4, heads=4, attn_dim_head=sizes.WIDTH // 4, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=layers), (token_ids(),), {}


@entry("x-transformers", slow=True)
def x_decoder_modern():
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=32, depth=3, heads=4, attn_dim_head=8, rotary_pos_emb=True, use_rmsnorm=True, ff_swish=True, ff_glu=True,
        attn_kv_heads=2,
    )  # fmt: skip
    model = TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=32, attn_layers=layers, num_memory_tokens=2, tie_embedding=True
    )
    return model, (token_ids(),), {"mask": padding_mask().bool()}


@entry("x-transformers", slow=True)
def x_autoregressive():
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=3, heads=4, attn_dim_head=8, alibi_pos_bias=True)
    model = TransformerWrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=layers)
    return AutoregressiveWrapper(model), (token_ids(),), {}


@entry("x-transformers")
def x_encoder_decoder():
    from x_transformers import XTransformer

    model = XTransformer(
        dim=32, enc_num_tokens=VOCAB, enc_depth=3, enc_heads=4, enc_max_seq_len=32, dec_num_tokens=VOCAB, dec_depth=3,
        dec_heads=4, dec_max_seq_len=32, tie_token_emb=True,
    )  # fmt: skip
    return model, (token_ids(), token_ids(8)), {"mask": padding_mask().bool()}


@entry("x-transformers")
def x_vit():
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=32, depth=3, heads=4, attn_dim_head=8)
    return ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=layers), (image(),), {}


@entry("x-transformers", slow=True)
def x_continuous():
    from x_transformers import ContinuousTransformerWrapper, Encoder

    layers = Encoder(dim=32, depth=3, heads=4, attn_dim_head=8, macaron=True)
    model = ContinuousTransformerWrapper(dim_in=6, dim_out=4, max_seq_len=32, attn_layers=layers)
    return model, (torch.randn(sizes.BATCH, 12, 6),), {"mask": padding_mask().bool()}
