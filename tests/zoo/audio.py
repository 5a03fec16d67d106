"""Models of sound, of transformers."""

from __future__ import annotations

import torch

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import SEQ2SEQ, SIZE, SPEECH, padding_mask, token_ids


@entry("transformers")
def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **SEQ2SEQ, num_mel_bins=16, max_source_positions=32, max_target_positions=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config), (torch.randn(sizes.BATCH, 16, 64),), {"labels": token_ids(8)}


@entry("transformers")
def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    model = Wav2Vec2ForCTC(Wav2Vec2Config(**SPEECH, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4))
    return model, (torch.randn(sizes.BATCH, 1600),), {"labels": torch.randint(3, 32, (sizes.BATCH, 6))}


@entry("transformers", slow=True)
def hubert():
    from transformers import HubertConfig, HubertModel

    model = HubertModel(HubertConfig(**SPEECH, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4))
    return model, (), {"input_values": torch.randn(sizes.BATCH, 1600)}


@entry("transformers")
def audio_spectrogram():
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(**SIZE, patch_size=8, frequency_stride=6, time_stride=6, max_length=32, num_mel_bins=32)
    return ASTForAudioClassification(config), (torch.randn(sizes.BATCH, 32, 32),), {}


@entry("transformers", slow=True)
def speech_to_text():
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    config = Speech2TextConfig(
        **SEQ2SEQ, conv_channels=32, input_feat_per_channel=16, max_source_positions=64, max_target_positions=32
    )
    kwargs = {
        "input_features": torch.randn(sizes.BATCH, 48, 16),
        "attention_mask": padding_mask(48),
        "labels": token_ids(8),
    }
    return Speech2TextForConditionalGeneration(config), (), kwargs


@entry("transformers")
def encodec():
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        num_filters=4, hidden_size=16, codebook_size=16, codebook_dim=16, upsampling_ratios=[4, 2], num_lstm_layers=1
    )
    return EncodecModel(config), (torch.randn(sizes.BATCH, 1, 320),), {}
