"""Models of text and images together, of transformers."""

from __future__ import annotations

import torch

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import GROUPED, TEXT, VISION, VOCAB, image, padding_mask, token_ids


@entry("transformers")
def clip():
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config={**TEXT, "max_position_embeddings": 32}, vision_config=VISION, projection_dim=16)
    kwargs = {"input_ids": token_ids(), "pixel_values": image(), "attention_mask": padding_mask(), "return_loss": True}
    return CLIPModel(config), (), kwargs


@entry("transformers", slow=True)
def siglip():
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(text_config={**TEXT, "max_position_embeddings": 16}, vision_config=VISION)
    return SiglipModel(config), (), {"input_ids": token_ids(16), "pixel_values": image()}


@entry("transformers", slow=True)
def blip():
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {**TEXT, "encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
    ids = token_ids()
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION, projection_dim=16))
    return model, (), {"pixel_values": image(), "input_ids": ids, "attention_mask": padding_mask(), "labels": ids}


@entry("transformers")
def vilt():
    from transformers import ViltConfig, ViltForQuestionAnswering

    model = ViltForQuestionAnswering(ViltConfig(**TEXT, image_size=32, patch_size=8, num_labels=6))
    return model, (), {"input_ids": token_ids(), "attention_mask": padding_mask(), "pixel_values": image()}


@entry("transformers")
def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**GROUPED), image_token_index=5,
        image_seq_length=16,
    )  # fmt: skip
    ids = torch.cat([token_ids(2), torch.full((sizes.BATCH, 16), 5), token_ids(6)], dim=1)
    kwargs = {"input_ids": ids, "pixel_values": image(), "attention_mask": padding_mask(24), "labels": ids}
    return LlavaForConditionalGeneration(config), (), kwargs


@entry("transformers", slow=True)
def vit_to_gpt2():
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    decoder = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    return VisionEncoderDecoderModel(config=config), (), {"pixel_values": image(), "decoder_input_ids": token_ids(8)}
