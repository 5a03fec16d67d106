"""Models of diffusers."""

from __future__ import annotations

import torch

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import image, padding_mask

_DOWN_UP = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


@entry("diffusers", slow=True)
def unet_2d():
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16, **_DOWN_UP, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, (image(16),), {"timestep": 10}


@entry("diffusers", slow=True)
def unet_2d_checkpointed():
    model, args, kwargs = unet_2d()
    model.enable_gradient_checkpointing()
    return model, args, kwargs


@entry("diffusers")
def unet_2d_condition():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16, **_DOWN_UP, cross_attention_dim=24, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model, (image(16, 4), torch.tensor([10, 400]), torch.randn(sizes.BATCH, 6, 24)), {}


@entry("diffusers", slow=True)
def transformer_2d():
    from diffusers import Transformer2DModel

    model = Transformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=16, num_layers=3, norm_num_groups=8,
        cross_attention_dim=24,
    )  # fmt: skip
    return model, (image(8, 16),), {"encoder_hidden_states": torch.randn(sizes.BATCH, 6, 24)}


@entry("diffusers")
def autoencoder_kl():
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        **_DOWN_UP, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    return model, (image(),), {}


@entry("diffusers")
def vq_model():
    from diffusers import VQModel

    model = VQModel(
        **_DOWN_UP, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=16,
    )  # fmt: skip
    return model, (image(),), {}


@entry("diffusers")
def dit():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=4, sample_size=8, num_embeds_ada_norm=100
    )
    return model, (image(8, 4),), {"timestep": torch.tensor([1, 40]), "class_labels": torch.tensor([0, 7])}


@entry("diffusers", slow=True)
def pixart():
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=3, sample_size=8, cross_attention_dim=32,
        caption_channels=24,
    )  # fmt: skip
    kwargs = {
        "encoder_hidden_states": torch.randn(sizes.BATCH, 6, 24),
        "encoder_attention_mask": padding_mask(6),
        "timestep": torch.tensor([1, 40]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, (image(8, 4),), kwargs


@entry("diffusers", slow=True)
def sd3():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16,
    )  # fmt: skip
    kwargs = {
        "hidden_states": image(8, 4),
        "encoder_hidden_states": torch.randn(sizes.BATCH, 6, 24),
        "pooled_projections": torch.randn(sizes.BATCH, 16),
        "timestep": torch.tensor([1, 40]),
    }
    return model, (), kwargs


@entry("diffusers")
def flux():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    kwargs = {
        "hidden_states": torch.randn(sizes.BATCH, 16, 8),
        "encoder_hidden_states": torch.randn(sizes.BATCH, 6, 24),
        "pooled_projections": torch.randn(sizes.BATCH, 16),
        "timestep": torch.tensor([0.1, 0.4]),
        "img_ids": places,
        "txt_ids": torch.zeros(6, 3),
    }
    return model, (), kwargs
