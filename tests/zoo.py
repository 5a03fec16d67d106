"""The zoo: many architectures in small random configurations, each called as its library's users call it.

Every maker builds a model and the inputs of one forward, offline and within a second or so. Makers seed nothing: call
``torch.manual_seed`` first. Libraries are imported inside the makers, so that this file needs only torch. Models are
the libraries' own, neither wrapped nor eased: they keep their caches, output classes, dropout and losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

BATCH = 2
VOCAB = 128

Make = Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Entry:
    """One architecture; ``make`` returns the model and the positional and keyword arguments of one forward."""

    name: str
    make: Make
    library: str
    trains: bool = True
    slow: bool = False
    """Whether a relative that is quicker stands for it, unless one asks for the slow tests."""


ZOO: dict[str, Entry] = {}


def entry(library: str, *, trains: bool = True, slow: bool = False) -> Callable[[Make], Make]:
    """Register a maker under its function's name."""

    def register(make: Make) -> Make:
        name = make.__name__
        if name in ZOO:
            raise ValueError(f"two entries are named {name}")
        ZOO[name] = Entry(name, make, library, trains, slow)
        return make

    return register


def _ids(length=12):
    """Token ids, none of them a special one."""
    return torch.randint(8, VOCAB, (BATCH, length))


def _mask(length=12):
    """An attention mask: the last row is padded at its end."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[-1, -length // 4 :] = 0
    return mask


def _image(size=32, channels=3):
    return torch.randn(BATCH, channels, size, size)


def _volume(size=32):
    return torch.randn(BATCH, 1, size, size, size)


_SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {"vocab_size": VOCAB, **_SIZE}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_VISION = {**_SIZE, "image_size": 32, "patch_size": 8}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_SPEECH = {**_SIZE, "vocab_size": 32, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)}


# ---- transformers: text encoders ----


@entry("transformers")
def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_TEXT)), (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers")
def bert_pretraining():
    from transformers import BertConfig, BertForPreTraining

    ids = _ids()
    kwargs = {"input_ids": ids, "labels": ids, "next_sentence_label": torch.randint(0, 2, (BATCH,))}
    return BertForPreTraining(BertConfig(**_TEXT)), (), kwargs


@entry("transformers", slow=True)
def roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = RobertaForSequenceClassification(RobertaConfig(**_TEXT, num_labels=3))
    return model, (_ids(),), {"attention_mask": _mask(), "labels": torch.randint(0, 3, (BATCH,))}


@entry("transformers", slow=True)
def electra():
    from transformers import ElectraConfig, ElectraForTokenClassification

    model = ElectraForTokenClassification(ElectraConfig(**_TEXT, embedding_size=16, num_labels=5))
    return model, (_ids(),), {"attention_mask": _mask()}


@entry("transformers")
def deberta_v2():
    from transformers import DebertaV2Config, DebertaV2ForQuestionAnswering

    config = DebertaV2Config(**_TEXT, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"])
    return DebertaV2ForQuestionAnswering(config), (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers")
def albert():
    from transformers import AlbertConfig, AlbertModel

    return AlbertModel(AlbertConfig(**_TEXT, embedding_size=16)), (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers")
def distilbert():
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    ids = _ids()
    model = DistilBertForMaskedLM(DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=4, n_heads=4, hidden_dim=64))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def mpnet():
    from transformers import MPNetConfig, MPNetModel

    return MPNetModel(MPNetConfig(**_TEXT)), (_ids(),), {}


@entry("transformers", slow=True)
def modernbert():
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(**_TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    return ModernBertForMaskedLM(config), (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers")
def fnet():
    from transformers import FNetConfig, FNetForMaskedLM

    config = FNetConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, intermediate_size=64)
    return FNetForMaskedLM(config), (), {"input_ids": _ids()}


@entry("transformers")
def layoutlm():
    from transformers import LayoutLMConfig, LayoutLMForTokenClassification

    corner = torch.randint(0, 400, (BATCH, 12, 2))
    boxes = torch.cat([corner, corner + torch.randint(1, 400, (BATCH, 12, 2))], dim=-1)
    model = LayoutLMForTokenClassification(LayoutLMConfig(**_TEXT, num_labels=4))
    return model, (), {"input_ids": _ids(), "bbox": boxes, "attention_mask": _mask()}


@entry("transformers")
def longformer():
    from transformers import LongformerConfig, LongformerModel

    model = LongformerModel(LongformerConfig(**_TEXT, attention_window=8))
    return model, (), {"input_ids": _ids(32), "attention_mask": _mask(32)}


@entry("transformers", slow=True)
def big_bird():
    from transformers import BigBirdConfig, BigBirdForMaskedLM

    config = BigBirdConfig(**_TEXT, block_size=4, num_random_blocks=1)
    return BigBirdForMaskedLM(config), (), {"input_ids": _ids(64), "attention_mask": _mask(64)}


@entry("transformers")
def xlnet():
    from transformers import XLNetConfig, XLNetLMHeadModel

    ids = _ids()
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=3, n_head=4, d_inner=64))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def funnel():
    from transformers import FunnelConfig, FunnelModel

    config = FunnelConfig(vocab_size=VOCAB, block_sizes=[2, 2, 1], d_model=32, n_head=4, d_head=8, d_inner=64)
    return FunnelModel(config), (), {"input_ids": _ids(16), "attention_mask": _mask(16)}


@entry("transformers")
def perceiver():
    from transformers import PerceiverConfig, PerceiverForMaskedLM

    config = PerceiverConfig(
        vocab_size=VOCAB, num_latents=8, d_latents=32, d_model=32, num_self_attends_per_block=3,
        num_self_attention_heads=4, num_cross_attention_heads=4, qk_channels=32, v_channels=32,
        max_position_embeddings=16,
    )  # fmt: skip
    return PerceiverForMaskedLM(config), (), {"inputs": _ids(16), "attention_mask": _mask(16)}


# ---- transformers: text decoders ----


@entry("transformers")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = _ids()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=4, n_head=4))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def gpt2_untied():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=4, n_head=4, tie_word_embeddings=False)
    return GPT2LMHeadModel(config), (_ids(),), {"attention_mask": _mask()}


@entry("transformers", slow=True)
def gpt_neo():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        window_size=8,
    )  # fmt: skip
    return GPTNeoForCausalLM(config), (), {"input_ids": _ids()}


@entry("transformers")
def gpt_neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**_TEXT)), (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers", slow=True)
def gptj():
    from transformers import GPTJConfig, GPTJForCausalLM

    ids = _ids()
    model = GPTJForCausalLM(GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, rotary_dim=4))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = _ids()
    kwargs = {"input_ids": ids, "attention_mask": _mask(), "labels": ids}
    return LlamaForCausalLM(LlamaConfig(**_GROUPED)), (), kwargs


@entry("transformers")
def llama_tied():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_GROUPED, tie_word_embeddings=True)), (_ids(),), {}


@entry("transformers", slow=True)
def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=8))
    return model, (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers")
def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ids = _ids()
    return Qwen2ForCausalLM(Qwen2Config(**_GROUPED)), (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_GROUPED, head_dim=8)), (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers", slow=True)
def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8))
    return model, (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers")
def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    ids = _ids()
    model = Gemma3ForCausalLM(Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers")
def phi():
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(PhiConfig(**_TEXT)), (), {"input_ids": _ids()}


@entry("transformers", slow=True)
def phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Phi3ForCausalLM(Phi3Config(**_GROUPED, pad_token_id=0))
    return model, (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers", slow=True)
def opt():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=64, word_embed_proj_dim=16,
    )  # fmt: skip
    return OPTForCausalLM(config), (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers")
def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=4, n_head=4))
    return model, (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers", slow=True)
def falcon():
    from transformers import FalconConfig, FalconForCausalLM

    ids = _ids()
    model = FalconForCausalLM(
        FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    )
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def stablelm():
    from transformers import StableLmConfig, StableLmForSequenceClassification

    model = StableLmForSequenceClassification(StableLmConfig(**_GROUPED, num_labels=3, pad_token_id=0))
    return model, (), {"input_ids": _ids(), "labels": torch.randint(0, 3, (BATCH,))}


# ---- transformers: encoder-decoders ----


@entry("transformers")
def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    kwargs = {"input_ids": _ids(), "attention_mask": _mask(), "labels": _ids(8)}
    return T5ForConditionalGeneration(config), (), kwargs


@entry("transformers", slow=True)
def t5_gated_untied():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), (), {"input_ids": _ids(), "decoder_input_ids": _ids(8)}


@entry("transformers")
def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    kwargs = {"input_ids": _ids(), "attention_mask": _mask(), "labels": _ids(8)}
    return BartForConditionalGeneration(BartConfig(**_SEQ2SEQ)), (), kwargs


@entry("transformers", slow=True)
def marian():
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(**_SEQ2SEQ, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    return MarianMTModel(config), (), {"input_ids": _ids(), "attention_mask": _mask(), "decoder_input_ids": _ids(8)}


@entry("transformers", slow=True)
def pegasus():
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    model = PegasusForConditionalGeneration(PegasusConfig(**_SEQ2SEQ))
    return model, (), {"input_ids": _ids(), "labels": _ids(8)}


@entry("transformers", slow=True)
def m2m_100():
    from transformers import M2M100Config, M2M100Model

    model = M2M100Model(M2M100Config(**_SEQ2SEQ))
    return model, (), {"input_ids": _ids(), "attention_mask": _mask(), "decoder_input_ids": _ids(8)}


@entry("transformers")
def bert_to_bert():
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**_TEXT), BertConfig(**_TEXT))
    return EncoderDecoderModel(config=config), (), {"input_ids": _ids(), "decoder_input_ids": _ids(8)}


# ---- transformers: vision ----


@entry("transformers")
def vit():
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(**_VISION, num_labels=10))
    return model, (), {"pixel_values": _image(), "labels": torch.randint(0, 10, (BATCH,))}


@entry("transformers")
def vit_mae():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        **_VISION, decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
    )  # fmt: skip
    return ViTMAEForPreTraining(config), (_image(),), {}


@entry("transformers", slow=True)
def deit():
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    return DeiTForImageClassificationWithTeacher(DeiTConfig(**_VISION, num_labels=10)), (_image(),), {}


@entry("transformers")
def beit():
    from transformers import BeitConfig, BeitForImageClassification

    config = BeitConfig(**_VISION, use_relative_position_bias=True, num_labels=10)
    return BeitForImageClassification(config), (_image(),), {}


@entry("transformers", slow=True)
def dinov2():
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=32, patch_size=8
    )
    return Dinov2Model(config), (), {"pixel_values": _image()}


@entry("transformers")
def swin():
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2, 2], num_heads=[2, 4, 4], window_size=4, num_labels=10
    )
    return SwinForImageClassification(config), (), {"pixel_values": _image()}


@entry("transformers")
def convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], num_labels=10)
    return ConvNextForImageClassification(config), (_image(64),), {}


@entry("transformers")
def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 2, 2], layer_type="basic")
    return ResNetForImageClassification(config), (_image(64),), {}


@entry("transformers", slow=True)
def mobilenet_v2():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(image_size=64, depth_multiplier=0.35, num_labels=10)
    return MobileNetV2ForImageClassification(config), (_image(64),), {}


@entry("transformers")
def segformer():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=32, num_labels=5,
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    return model, (), {"pixel_values": _image(64), "labels": torch.randint(0, 5, (BATCH, 64, 64))}


@entry("transformers", slow=True)
def dpt():
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        **_VISION, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 16, 24, 32], fusion_hidden_size=16
    )
    return DPTForDepthEstimation(config), (_image(),), {}


@entry("transformers")
def detr():
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = {name: value for name, value in _SEQ2SEQ.items() if name != "vocab_size"}
    model = DetrForObjectDetection(DetrConfig(**sizes, backbone_config=backbone, num_queries=8, num_labels=5))
    return model, (), {"pixel_values": _image(64), "pixel_mask": torch.ones(BATCH, 64, 64, dtype=torch.long)}


@entry("transformers", slow=True)
def yolos():
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        **_SIZE, image_size=[32, 48], patch_size=8, num_detection_tokens=8, num_labels=5,
        use_mid_position_embeddings=False,
    )  # fmt: skip
    return YolosForObjectDetection(config), (torch.randn(BATCH, 3, 32, 48),), {}


@entry("transformers")
def videomae():
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    model = VideoMAEForVideoClassification(VideoMAEConfig(**_VISION, num_frames=4, num_labels=5))
    return model, (torch.randn(BATCH, 4, 3, 32, 32),), {}


# ---- transformers: audio ----


@entry("transformers")
def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **_SEQ2SEQ, num_mel_bins=16, max_source_positions=32, max_target_positions=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config), (torch.randn(BATCH, 16, 64),), {"labels": _ids(8)}


@entry("transformers")
def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    model = Wav2Vec2ForCTC(Wav2Vec2Config(**_SPEECH, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4))
    return model, (torch.randn(BATCH, 1600),), {"labels": torch.randint(3, 32, (BATCH, 6))}


@entry("transformers", slow=True)
def hubert():
    from transformers import HubertConfig, HubertModel

    model = HubertModel(HubertConfig(**_SPEECH, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4))
    return model, (), {"input_values": torch.randn(BATCH, 1600)}


@entry("transformers")
def audio_spectrogram():
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(**_SIZE, patch_size=8, frequency_stride=6, time_stride=6, max_length=32, num_mel_bins=32)
    return ASTForAudioClassification(config), (torch.randn(BATCH, 32, 32),), {}


@entry("transformers", slow=True)
def speech_to_text():
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    config = Speech2TextConfig(
        **_SEQ2SEQ, conv_channels=32, input_feat_per_channel=16, max_source_positions=64, max_target_positions=32
    )
    kwargs = {"input_features": torch.randn(BATCH, 48, 16), "attention_mask": _mask(48), "labels": _ids(8)}
    return Speech2TextForConditionalGeneration(config), (), kwargs


@entry("transformers")
def encodec():
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        num_filters=4, hidden_size=16, codebook_size=16, codebook_dim=16, upsampling_ratios=[4, 2], num_lstm_layers=1
    )
    return EncodecModel(config), (torch.randn(BATCH, 1, 320),), {}


# ---- transformers: several modalities ----


@entry("transformers")
def clip():
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config={**_TEXT, "max_position_embeddings": 32}, vision_config=_VISION, projection_dim=16)
    kwargs = {"input_ids": _ids(), "pixel_values": _image(), "attention_mask": _mask(), "return_loss": True}
    return CLIPModel(config), (), kwargs


@entry("transformers", slow=True)
def siglip():
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(text_config={**_TEXT, "max_position_embeddings": 16}, vision_config=_VISION)
    return SiglipModel(config), (), {"input_ids": _ids(16), "pixel_values": _image()}


@entry("transformers", slow=True)
def blip():
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {**_TEXT, "encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
    ids = _ids()
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=_VISION, projection_dim=16))
    return model, (), {"pixel_values": _image(), "input_ids": ids, "attention_mask": _mask(), "labels": ids}


@entry("transformers")
def vilt():
    from transformers import ViltConfig, ViltForQuestionAnswering

    model = ViltForQuestionAnswering(ViltConfig(**_TEXT, image_size=32, patch_size=8, num_labels=6))
    return model, (), {"input_ids": _ids(), "attention_mask": _mask(), "pixel_values": _image()}


@entry("transformers")
def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION), text_config=LlamaConfig(**_GROUPED), image_token_index=5,
        image_seq_length=16,
    )  # fmt: skip
    ids = torch.cat([_ids(2), torch.full((BATCH, 16), 5), _ids(6)], dim=1)
    kwargs = {"input_ids": ids, "pixel_values": _image(), "attention_mask": _mask(24), "labels": ids}
    return LlavaForConditionalGeneration(config), (), kwargs


@entry("transformers", slow=True)
def vit_to_gpt2():
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    decoder = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**_VISION), decoder)
    return VisionEncoderDecoderModel(config=config), (), {"pixel_values": _image(), "decoder_input_ids": _ids(8)}


# ---- transformers: mixtures of experts ----


@entry("transformers")
def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    ids = _ids()
    kwargs = {"input_ids": ids, "attention_mask": _mask(), "labels": ids}
    return MixtralForCausalLM(MixtralConfig(**_GROUPED, num_local_experts=4)), (), kwargs


@entry("transformers", slow=True)
def mixtral_router_loss():
    from transformers import MixtralConfig, MixtralForCausalLM

    ids = _ids()
    model = MixtralForCausalLM(MixtralConfig(**_GROUPED, num_local_experts=4, output_router_logits=True))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def qwen2_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **_GROUPED, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    )
    return Qwen2MoeForCausalLM(config), (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers", slow=True)
def olmoe():
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeForCausalLM(OlmoeConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2)), (_ids(),), {}


@entry("transformers")
def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**_GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    return GptOssForCausalLM(config), (), {"input_ids": _ids()}


@entry("transformers", slow=True)
def deepseek_v3():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **_TEXT, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config), (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers", slow=True)
def switch_transformers():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_sparse_encoder_layers=2, num_decoder_layers=4,
        num_sparse_decoder_layers=2, num_heads=4, num_experts=4, decoder_start_token_id=0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config), (), {"input_ids": _ids(), "labels": _ids(8)}


# ---- transformers: state spaces and recurrence ----


@entry("transformers", slow=True)
def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    ids = _ids()
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, state_size=8)
    return MambaForCausalLM(config), (), {"input_ids": ids, "labels": ids}


@entry("transformers")
def mamba2():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, state_size=8, num_heads=8, head_dim=8, n_groups=2,
        chunk_size=8,
    )  # fmt: skip
    return Mamba2ForCausalLM(config), (), {"input_ids": _ids(), "attention_mask": _mask()}


@entry("transformers", slow=True)
def rwkv():
    from transformers import RwkvConfig, RwkvForCausalLM

    model = RwkvForCausalLM(RwkvConfig(vocab_size=VOCAB, context_length=32, hidden_size=32, num_hidden_layers=4))
    return model, (), {"input_ids": _ids()}


@entry("transformers")
def recurrent_gemma():
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    config = RecurrentGemmaConfig(**_GROUPED, lru_width=32, attention_window_size=8, conv1d_width=4)
    return RecurrentGemmaForCausalLM(config), (), {"input_ids": _ids()}


# ---- transformers: time series ----


@entry("transformers")
def patchtst():
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=3, context_length=32, patch_length=4, patch_stride=4, d_model=32, ffn_dim=64,
        prediction_length=8,
    )  # fmt: skip
    kwargs = {"past_values": torch.randn(BATCH, 32, 3), "future_values": torch.randn(BATCH, 8, 3)}
    return PatchTSTForPrediction(config), (), kwargs


@entry("transformers")
def patchtsmixer():
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

    config = PatchTSMixerConfig(num_input_channels=3, context_length=32, d_model=16, prediction_length=8)
    return PatchTSMixerForPrediction(config), (torch.randn(BATCH, 32, 3),), {}


@entry("transformers", slow=True)
def time_series():
    from transformers import TimeSeriesTransformerConfig, TimeSeriesTransformerForPrediction

    config = TimeSeriesTransformerConfig(
        prediction_length=6, context_length=12, lags_sequence=[1, 2, 3], num_time_features=2, d_model=32,
        encoder_layers=3, decoder_layers=3,
    )  # fmt: skip
    kwargs = {
        "past_values": torch.randn(BATCH, 15),
        "past_time_features": torch.randn(BATCH, 15, 2),
        "past_observed_mask": torch.ones(BATCH, 15),
        "future_values": torch.randn(BATCH, 6),
        "future_time_features": torch.randn(BATCH, 6, 2),
    }
    return TimeSeriesTransformerForPrediction(config), (), kwargs


# ---- diffusers ----

_DOWN_UP = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


@entry("diffusers", slow=True)
def unet_2d():
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16, **_DOWN_UP, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, (_image(16),), {"timestep": 10}


@entry("diffusers")
def unet_2d_condition():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16, **_DOWN_UP, cross_attention_dim=24, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model, (_image(16, 4), torch.tensor([10, 400]), torch.randn(BATCH, 6, 24)), {}


@entry("diffusers", slow=True)
def transformer_2d():
    from diffusers import Transformer2DModel

    model = Transformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=16, num_layers=3, norm_num_groups=8,
        cross_attention_dim=24,
    )  # fmt: skip
    return model, (_image(8, 16),), {"encoder_hidden_states": torch.randn(BATCH, 6, 24)}


@entry("diffusers")
def autoencoder_kl():
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        **_DOWN_UP, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    return model, (_image(),), {}


@entry("diffusers")
def vq_model():
    from diffusers import VQModel

    model = VQModel(
        **_DOWN_UP, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=16,
    )  # fmt: skip
    return model, (_image(),), {}


@entry("diffusers")
def dit():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=4, sample_size=8, num_embeds_ada_norm=100
    )
    return model, (_image(8, 4),), {"timestep": torch.tensor([1, 40]), "class_labels": torch.tensor([0, 7])}


@entry("diffusers", slow=True)
def pixart():
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=3, sample_size=8, cross_attention_dim=32,
        caption_channels=24,
    )  # fmt: skip
    kwargs = {
        "encoder_hidden_states": torch.randn(BATCH, 6, 24),
        "encoder_attention_mask": _mask(6),
        "timestep": torch.tensor([1, 40]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, (_image(8, 4),), kwargs


@entry("diffusers", slow=True)
def sd3():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16,
    )  # fmt: skip
    kwargs = {
        "hidden_states": _image(8, 4),
        "encoder_hidden_states": torch.randn(BATCH, 6, 24),
        "pooled_projections": torch.randn(BATCH, 16),
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
        "hidden_states": torch.randn(BATCH, 16, 8),
        "encoder_hidden_states": torch.randn(BATCH, 6, 24),
        "pooled_projections": torch.randn(BATCH, 16),
        "timestep": torch.tensor([0.1, 0.4]),
        "img_ids": places,
        "txt_ids": torch.zeros(6, 3),
    }
    return model, (), kwargs


# ---- monai ----


@entry("monai")
def monai_unet():
    from monai.networks.nets import UNet

    model = UNet(
        spatial_dims=2, in_channels=1, out_channels=3, channels=(8, 16, 24, 32), strides=(2, 2, 2), num_res_units=2
    )
    return model, (_image(32, 1),), {}


@entry("monai", slow=True)
def monai_basic_unet():
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=3, features=(8, 8, 16, 16, 32, 8)), (_volume(),), {}


@entry("monai")
def monai_attention_unet():
    from monai.networks.nets import AttentionUnet

    model = AttentionUnet(spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2))
    return model, (_image(32, 1),), {}


@entry("monai")
def monai_segresnet():
    from monai.networks.nets import SegResNet

    return SegResNet(spatial_dims=3, init_filters=8, blocks_down=(1, 2, 2), blocks_up=(1, 1)), (_volume(16),), {}


@entry("monai")
def monai_dynunet():
    from monai.networks.nets import DynUNet

    model = DynUNet(
        spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3, 3], strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2], filters=[8, 16, 24, 32],
    )  # fmt: skip
    return model, (_image(32, 1),), {}


@entry("monai", slow=True)
def monai_dynunet_deep():
    from monai.networks.nets import DynUNet

    model = DynUNet(
        spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3, 3], strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2], filters=[8, 16, 24, 32], deep_supervision=True, res_block=True,
    )  # fmt: skip
    return model, (_image(32, 1),), {}


@entry("monai", slow=True)
def monai_unetr():
    from monai.networks.nets import UNETR

    model = UNETR(
        in_channels=1, out_channels=2, img_size=32, feature_size=8, hidden_size=32, mlp_dim=64, num_heads=4,
        spatial_dims=2,
    )  # fmt: skip
    return model, (_image(32, 1),), {}


@entry("monai", slow=True)
def monai_swin_unetr():
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(in_channels=1, out_channels=2, depths=(1, 1, 1, 1), feature_size=12, spatial_dims=2)
    return model, (_image(64, 1),), {}


@entry("monai")
def monai_densenet():
    from monai.networks.nets import DenseNet

    model = DenseNet(
        spatial_dims=2, in_channels=1, out_channels=4, init_features=16, growth_rate=8, block_config=(2, 3, 2)
    )
    return model, (_image(64, 1),), {}


@entry("monai")
def monai_vae():
    from monai.networks.nets import VarAutoEncoder

    model = VarAutoEncoder(
        spatial_dims=2, in_shape=(1, 32, 32), out_channels=1, latent_size=8, channels=(8, 16, 32), strides=(1, 2, 2)
    )
    return model, (_image(32, 1),), {}


# ---- x-transformers ----


@entry("x-transformers")
def x_decoder():
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=4, heads=4, attn_dim_head=8, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=layers), (_ids(),), {}


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
    return model, (_ids(),), {"mask": _mask().bool()}


@entry("x-transformers", slow=True)
def x_autoregressive():
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=3, heads=4, attn_dim_head=8, alibi_pos_bias=True)
    model = TransformerWrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=layers)
    return AutoregressiveWrapper(model), (_ids(),), {}


@entry("x-transformers")
def x_encoder_decoder():
    from x_transformers import XTransformer

    model = XTransformer(
        dim=32, enc_num_tokens=VOCAB, enc_depth=3, enc_heads=4, enc_max_seq_len=32, dec_num_tokens=VOCAB, dec_depth=3,
        dec_heads=4, dec_max_seq_len=32, tie_token_emb=True,
    )  # fmt: skip
    return model, (_ids(), _ids(8)), {"mask": _mask().bool()}


@entry("x-transformers")
def x_vit():
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=32, depth=3, heads=4, attn_dim_head=8)
    return ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=layers), (_image(),), {}


@entry("x-transformers", slow=True)
def x_continuous():
    from x_transformers import ContinuousTransformerWrapper, Encoder

    layers = Encoder(dim=32, depth=3, heads=4, attn_dim_head=8, macaron=True)
    model = ContinuousTransformerWrapper(dim_in=6, dim_out=4, max_seq_len=32, attn_layers=layers)
    return model, (torch.randn(BATCH, 12, 6),), {"mask": _mask().bool()}


# ---- torch: chains and transformers ----


@entry("torch")
def mlp():
    """A Sequential of Sequentials."""
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.1)) for _ in range(4)]
    return nn.Sequential(nn.Linear(16, 32), nn.Sequential(*blocks), nn.Linear(32, 4)), (torch.randn(BATCH, 16),), {}


@entry("torch")
def torch_transformer():
    model = nn.Transformer(32, 4, 3, 3, 64, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(8)
    kwargs = {"tgt_mask": causal, "src_key_padding_mask": _mask() == 0}
    return model, (torch.randn(BATCH, 12, 32), torch.randn(BATCH, 8, 32)), kwargs


@entry("torch")
def torch_encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(32), enable_nested_tensor=False)
    return model, (torch.randn(BATCH, 12, 32),), {}


# ---- torch: convolutions ----


class ResidualBlock(nn.Module):
    def __init__(self, inside, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or inside != out:
            self.down = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class HandResNet(nn.Module):
    def __init__(self, widths=(16, 32, 48)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.layers = nn.Sequential()
        for inside, out in pairwise((16, *widths)):
            self.layers.append(nn.Sequential(ResidualBlock(inside, out, 2), ResidualBlock(out, out, 1)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x):
        return self.head(self.pool(self.layers(self.stem(x))).flatten(1))


@entry("torch")
def hand_resnet():
    return HandResNet(), (_image(),), {}


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, squeeze and excite, project; the input is added where shapes agree."""

    def __init__(self, inside, out, stride, expand=4):
        super().__init__()
        hidden = inside * expand
        self.expand = nn.Sequential(nn.Conv2d(inside, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden, inside, 1), nn.ReLU(), nn.Conv2d(inside, hidden, 1), nn.Sigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out))
        self.adds = stride == 1 and inside == out

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.gate(y))
        return x + y if self.adds else y


@entry("torch")
def hand_mobilenet():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), InvertedResidual(8, 8, 1), InvertedResidual(8, 16, 2),
        InvertedResidual(16, 16, 1), InvertedResidual(16, 24, 2), InvertedResidual(24, 24, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 10),
    )  # fmt: skip
    return model, (_image(),), {}


def _double_conv(inside, out):
    return nn.Sequential(
        nn.Conv2d(inside, out, 3, padding=1), nn.GroupNorm(4, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1)
    )


class PoppedUNet(nn.Module):
    """Skips are kept in a list on the way down and popped on the way up."""

    def __init__(self, widths=(8, 16, 32)):
        super().__init__()
        self.down = nn.ModuleList(_double_conv(i, o) for i, o in pairwise((3, *widths)))
        self.pool = nn.MaxPool2d(2)
        self.middle = _double_conv(widths[-1], widths[-1])
        self.up = nn.ModuleList(
            _double_conv(2 * w, o) for w, o in zip(widths[::-1], (*widths[-2::-1], widths[0]), strict=True)
        )
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2)
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.head(x)


@entry("torch")
def hand_unet():
    return PoppedUNet(), (_image(),), {}


class WaveLayer(nn.Module):
    def __init__(self, width, dilation):
        super().__init__()
        self.pad = dilation
        self.filter = nn.Conv1d(width, width, 2, dilation=dilation)
        self.gate = nn.Conv1d(width, width, 2, dilation=dilation)
        self.residual = nn.Conv1d(width, width, 1)
        self.skip = nn.Conv1d(width, 2 * width, 1)

    def forward(self, x):
        padded = F.pad(x, (self.pad, 0))
        y = torch.tanh(self.filter(padded)) * torch.sigmoid(self.gate(padded))
        return x + self.residual(y), self.skip(y)


class WaveNet(nn.Module):
    """Each layer passes a residual on and adds its skip to one sum."""

    def __init__(self, width=16, layers=6):
        super().__init__()
        self.start = nn.Conv1d(1, width, 1)
        self.layers = nn.ModuleList(WaveLayer(width, 2**i) for i in range(layers))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(2 * width, 32, 1), nn.ReLU(), nn.Conv1d(32, 32, 1))

    def forward(self, x):
        x = self.start(x)
        total = 0
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return self.end(total)


@entry("torch")
def hand_wavenet():
    return WaveNet(), (torch.randn(BATCH, 1, 96),), {}


class Inception(nn.Module):
    """Branches of different kernels over one input, joined along the channels."""

    def __init__(self, inside, out):
        super().__init__()
        self.branches = nn.ModuleDict({f"k{k}": nn.Conv2d(inside, out, k, padding=k // 2) for k in (1, 3, 5)})
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(inside, out, 1))

    def forward(self, x):
        return F.relu(torch.cat([*(branch(x) for branch in self.branches.values()), self.pooled(x)], dim=1))


@entry("torch")
def hand_inception():
    blocks = [Inception(3, 8), nn.MaxPool2d(2), Inception(32, 8), Inception(32, 8), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32, 10)), (_image(),), {}


class MixerBlock(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.within = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x):
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


@entry("torch")
def hand_mixer():
    blocks = nn.Sequential(*[MixerBlock(24, 16) for _ in range(4)])
    return nn.Sequential(nn.Linear(6, 16), blocks, nn.LayerNorm(16), nn.Linear(16, 4)), (torch.randn(BATCH, 24, 6),), {}


# ---- torch: recurrence ----


class AttentiveSeq2Seq(nn.Module):
    """A bidirectional LSTM reads; an LSTM cell writes token after token, attending to what was read."""

    def __init__(self, width=32):
        super().__init__()
        self.source = nn.Embedding(VOCAB, width)
        self.target = nn.Embedding(VOCAB, width)
        self.encoder = nn.LSTM(width, width // 2, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.cell = nn.LSTMCell(2 * width, width)
        self.query = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(2 * width, VOCAB)

    def forward(self, source, target):
        memory, (hidden, cell) = self.encoder(self.source(source))
        h, c = torch.cat([hidden[-2], hidden[-1]], dim=-1), torch.cat([cell[-2], cell[-1]], dim=-1)
        context, logits = torch.zeros_like(h), []
        for token in self.target(target).unbind(1):
            h, c = self.cell(torch.cat([token, context], dim=-1), (h, c))
            weights = torch.softmax(torch.einsum("bd,btd->bt", self.query(h), memory), dim=-1)
            context = torch.einsum("bt,btd->bd", weights, memory)
            logits.append(self.out(torch.cat([h, context], dim=-1)))
        return torch.stack(logits, dim=1)


@entry("torch")
def lstm_seq2seq():
    return AttentiveSeq2Seq(), (_ids(), _ids(6)), {}


class RecurrentTagger(nn.Module):
    """Several GRUs with a residual around each; returns a dictionary with the last state."""

    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, ids, lengths=None):
        x = self.embed(ids)
        for layer in self.layers:
            y, state = layer(x)
            x = x + y
        if lengths is not None:
            x = x.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None], 0.0)
        return {"tags": self.head(x), "state": state}


@entry("torch")
def gru_tagger():
    return RecurrentTagger(), (_ids(),), {"lengths": torch.tensor([12, 7])}


# ---- torch: several parts, shared weights, graphs ----


class Gan(nn.Module):
    """A generator and a discriminator, which judges both the generated and the real images."""

    def __init__(self, width=16):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(8, width * 16), nn.Unflatten(1, (width, 4, 4)), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(width * 16, 1),
        )  # fmt: skip

    def forward(self, noise, real):
        fake = self.generator(noise)
        return fake, self.discriminator(fake), self.discriminator(real)


@entry("torch")
def gan():
    return Gan(), (torch.randn(BATCH, 8), _image(16)), {}


class MessagePassing(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.update = nn.GRUCell(width, width)

    def forward(self, x, edges):
        source, target = edges
        messages = self.message(torch.cat([x[:, source], x[:, target]], dim=-1))
        received = torch.zeros_like(x).index_add(1, target, messages)
        return self.update(received.flatten(0, 1), x.flatten(0, 1)).view_as(x)


class GraphNet(nn.Module):
    """Rounds of message passing over the edges of one graph, for a batch of node features."""

    def __init__(self, edges, width=24, rounds=4):
        super().__init__()
        self.register_buffer("edges", edges)
        self.embed = nn.Linear(6, width)
        self.rounds = nn.ModuleList(MessagePassing(width) for _ in range(rounds))
        self.node_head = nn.Linear(width, 3)
        self.graph_head = nn.Linear(width, 1)

    def forward(self, nodes):
        x = self.embed(nodes)
        for layer in self.rounds:
            x = layer(x, self.edges)
        return {"nodes": self.node_head(x), "graph": self.graph_head(x.mean(1))}


@entry("torch")
def graph_net():
    return GraphNet(torch.randint(0, 10, (2, 30))), (torch.randn(BATCH, 10, 6),), {}


class Siamese(nn.Module):
    """One encoder for two inputs."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 32)
        )
        self.head = nn.Linear(64, 1)

    def forward(self, left, right):
        a, b = self.encoder(left), self.encoder(right)
        return self.head(torch.cat([(a - b).abs(), a * b], dim=-1)), F.cosine_similarity(a, b)


@entry("torch")
def siamese():
    return Siamese(), (_image(16), _image(16)), {}


class SoftExperts(nn.Module):
    """Every expert runs; a softmax weighs them."""

    def __init__(self, width=32, experts=4):
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)) for _ in range(experts)
        )

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return x + (outputs * weights.unsqueeze(-2)).sum(-1), weights


class SoftMixture(nn.Module):
    def __init__(self, width=32, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(SoftExperts(width) for _ in range(layers))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        usage = []
        for layer in self.layers:
            x, weights = layer(x)
            usage.append(weights)
        return self.head(x), usage


@entry("torch")
def soft_experts():
    return SoftMixture(), (torch.randn(BATCH, 10, 32),), {}


class TopExperts(SoftExperts):
    """Each token goes to one expert; an expert may get none."""

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            if mine.any():
                out[mine] = expert(x[mine])
        return x + out * weights.unsqueeze(-1)


@entry("torch")
def top_experts():
    layers = [module for _ in range(3) for module in (TopExperts(), nn.LayerNorm(32))]
    return nn.Sequential(*layers, nn.Linear(32, 4)), (torch.randn(BATCH, 10, 32),), {}


class TiedAutoencoder(nn.Module):
    """The decoder uses the encoder's weights, transposed."""

    def __init__(self, widths=(48, 32, 16)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(width) for width in widths[-2::-1])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        code = x
        for layer, bias in zip(reversed(self.layers), self.biases, strict=True):
            x = torch.tanh(F.linear(x, layer.weight.t(), bias))
        return x, code


@entry("torch")
def tied_autoencoder():
    return TiedAutoencoder(), (torch.randn(BATCH, 48),), {}


class LoopedBlock(nn.Module):
    """One block applied many times, fed with the input each time, as a universal transformer does."""

    def __init__(self, width=32, steps=5):
        super().__init__()
        self.steps = steps
        self.block = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True)
        self.step = nn.Parameter(torch.randn(steps, width) * 0.02)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        y = torch.zeros_like(x)
        for i in range(self.steps):
            y = self.block(x + y + self.step[i])
        return self.head(y)


@entry("torch")
def looped_block():
    return LoopedBlock(), (torch.randn(BATCH, 10, 32),), {}


class Recommender(nn.Module):
    """Tables and a dense part meet in their pairwise products (DLRM)."""

    def __init__(self, tables=4, width=16):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(50, width) for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, width))
        self.register_buffer("pairs", torch.triu_indices(tables + 1, tables + 1, 1))
        self.top = nn.Sequential(nn.Linear(width + self.pairs.shape[1], 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense, bags):
        x = self.bottom(dense)
        rows = torch.stack([x, *(table(bag) for table, bag in zip(self.tables, bags, strict=True))], dim=1)
        products = torch.bmm(rows, rows.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return torch.sigmoid(self.top(torch.cat([x, products], dim=1)))


@entry("torch")
def recommender():
    bags = [torch.randint(0, 50, (BATCH, 3)) for _ in range(4)]
    return Recommender(), (torch.randn(BATCH, 8),), {"bags": bags}


class MultiTask(nn.Module):
    """A dictionary of inputs, a shared trunk conditioned by the text, a dictionary of nested outputs."""

    def __init__(self, width=32):
        super().__init__()
        self.vision = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(2))
        self.text = nn.Embedding(VOCAB, width)
        self.film = nn.Linear(width, 2 * width)
        self.trunk = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.enter = nn.Linear(16, width)
        self.heads = nn.ModuleDict({"kind": nn.Linear(width, 5), "box": nn.Linear(width, 4)})

    def forward(self, batch):
        scale, shift = self.film(self.text(batch["text"]).mean(1)).chunk(2, dim=-1)
        x = self.enter(self.vision(batch["image"]).transpose(1, 2))
        for layer in self.trunk:
            x = F.gelu(layer(x)) * (1 + scale[:, None]) + shift[:, None]
        pooled = x.mean(1)
        return {"heads": {name: head(pooled) for name, head in self.heads.items()}, "features": (x, pooled)}


@entry("torch")
def multi_task():
    return MultiTask(), ({"image": _image(16), "text": _ids(5)},), {}


class Ranker(nn.Module):
    """For inference alone: the best of a fixed set of items for each query, without gradients."""

    def __init__(self, width=32, items=40):
        super().__init__()
        self.query = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width))
        self.register_buffer("items", torch.randn(items, width))

    @torch.no_grad()
    def forward(self, x):
        best = (self.query(x) @ self.items.t()).topk(5)
        return best.values.softmax(-1), best.indices


@entry("torch", trains=False)
def ranker():
    return Ranker(), (torch.randn(BATCH, 8),), {}
