"""State spaces, recurrence and time series, of transformers."""

from __future__ import annotations

import torch

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import GROUPED, VOCAB, padding_mask, token_ids

# State spaces and recurrence


@entry("transformers", slow=True)
def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    ids = token_ids()
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, state_size=8)
    return MambaForCausalLM(config), (), {"input_ids": ids, "labels": ids}


@entry("transformers")
def mamba2():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, state_size=8, num_heads=8, head_dim=8, n_groups=2,
        chunk_size=8,
    )  # fmt: skip
    return Mamba2ForCausalLM(config), (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers", slow=True)
def rwkv():
    from transformers import RwkvConfig, RwkvForCausalLM

    model = RwkvForCausalLM(RwkvConfig(vocab_size=VOCAB, context_length=32, hidden_size=32, num_hidden_layers=4))
    return model, (), {"input_ids": token_ids()}


@entry("transformers")
def recurrent_gemma():
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    config = RecurrentGemmaConfig(**GROUPED, lru_width=32, attention_window_size=8, conv1d_width=4)
    return RecurrentGemmaForCausalLM(config), (), {"input_ids": token_ids()}


# Time series


@entry("transformers")
def patchtst():
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=3, context_length=32, patch_length=4, patch_stride=4, d_model=32, ffn_dim=64,
        prediction_length=8,
    )  # fmt: skip
    kwargs = {"past_values": torch.randn(sizes.BATCH, 32, 3), "future_values": torch.randn(sizes.BATCH, 8, 3)}
    return PatchTSTForPrediction(config), (), kwargs


@entry("transformers")
def patchtsmixer():
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

    config = PatchTSMixerConfig(num_input_channels=3, context_length=32, d_model=16, prediction_length=8)
    return PatchTSMixerForPrediction(config), (torch.randn(sizes.BATCH, 32, 3),), {}


@entry("transformers", slow=True)
def time_series():
    from transformers import TimeSeriesTransformerConfig, TimeSeriesTransformerForPrediction

    config = TimeSeriesTransformerConfig(
        prediction_length=6, context_length=12, lags_sequence=[1, 2, 3], num_time_features=2, d_model=32,
        encoder_layers=3, decoder_layers=3,
    )  # fmt: skip
    kwargs = {
        "past_values": torch.randn(sizes.BATCH, 15),
        "past_time_features": torch.randn(sizes.BATCH, 15, 2),
        "past_observed_mask": torch.ones(sizes.BATCH, 15),
        "future_values": torch.randn(sizes.BATCH, 6),
        "future_time_features": torch.randn(sizes.BATCH, 6, 2),
    }
    return TimeSeriesTransformerForPrediction(config), (), kwargs
