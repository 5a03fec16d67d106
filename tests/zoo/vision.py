"""Models of images and videos, of transformers."""

from __future__ import annotations

import torch

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import SEQ2SEQ, SIZE, VISION, image


@entry("transformers")
def vit():
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(**VISION, num_labels=10))
    return model, (), {"pixel_values": image(), "labels": torch.randint(0, 10, (sizes.BATCH,))}


@entry("transformers")
def vit_mae():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        **VISION, decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
    )  # fmt: skip
    return ViTMAEForPreTraining(config), (image(),), {}


@entry("transformers", slow=True)
def deit():
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    return DeiTForImageClassificationWithTeacher(DeiTConfig(**VISION, num_labels=10)), (image(),), {}


@entry("transformers")
def beit():
    from transformers import BeitConfig, BeitForImageClassification

    config = BeitConfig(**VISION, use_relative_position_bias=True, num_labels=10)
    return BeitForImageClassification(config), (image(),), {}


@entry("transformers", slow=True)
def dinov2():
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=32, patch_size=8
    )
    return Dinov2Model(config), (), {"pixel_values": image()}


@entry("transformers")
def swin():
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2, 2], num_heads=[2, 4, 4], window_size=4, num_labels=10
    )
    return SwinForImageClassification(config), (), {"pixel_values": image()}


@entry("transformers")
def convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], num_labels=10)
    return ConvNextForImageClassification(config), (image(64),), {}


@entry("transformers")
def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    widths = [16 * sizes.CHANNELS, 32 * sizes.CHANNELS, 48 * sizes.CHANNELS, 64 * sizes.CHANNELS]
    config = ResNetConfig(embedding_size=widths[0], hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type="basic")
    return ResNetForImageClassification(config), (image(64),), {}


@entry("transformers", slow=True)
def mobilenet_v2():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(image_size=64, depth_multiplier=0.35, num_labels=10)
    return MobileNetV2ForImageClassification(config), (image(64),), {}


@entry("transformers")
def segformer():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=32, num_labels=5,
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    return model, (), {"pixel_values": image(64), "labels": torch.randint(0, 5, (sizes.BATCH, 64, 64))}


@entry("transformers", slow=True)
def dpt():
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        **VISION, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 16, 24, 32], fusion_hidden_size=16
    )
    return DPTForDepthEstimation(config), (image(),), {}


@entry("transformers")
def detr():
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    widths = {name: value for name, value in SEQ2SEQ.items() if name != "vocab_size"}
    model = DetrForObjectDetection(DetrConfig(**widths, backbone_config=backbone, num_queries=8, num_labels=5))
    return model, (), {"pixel_values": image(64), "pixel_mask": torch.ones(sizes.BATCH, 64, 64, dtype=torch.long)}


@entry("transformers", slow=True)
def yolos():
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        **SIZE, image_size=[32, 48], patch_size=8, num_detection_tokens=8, num_labels=5,
        use_mid_position_embeddings=False,
    )  # fmt: skip
    return YolosForObjectDetection(config), (torch.randn(sizes.BATCH, 3, 32, 48),), {}


@entry("transformers")
def videomae():
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    model = VideoMAEForVideoClassification(VideoMAEConfig(**VISION, num_frames=4, num_labels=5))
    return model, (torch.randn(sizes.BATCH, 4, 3, 32, 32),), {}
