"""Decoders of text, of transformers."""

from __future__ import annotations

import torch

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import GROUPED, TEXT, VOCAB, padding_mask, token_ids


@entry("transformers")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = token_ids()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=sizes.WIDTH, n_layer=4, n_head=4))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers")
def gpt2_checkpointed():
    model, args, kwargs = gpt2()
    model.gradient_checkpointing_enable()
    return model, args, kwargs


@entry("transformers", slow=True)
def gpt2_untied():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=4, n_head=4, tie_word_embeddings=False)
    return GPT2LMHeadModel(config), (token_ids(),), {"attention_mask": padding_mask()}


@entry("transformers", slow=True)
def gpt_neo():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        window_size=8,
    )  # fmt: skip
    return GPTNeoForCausalLM(config), (), {"input_ids": token_ids()}


@entry("transformers")
def gpt_neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**TEXT)), (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers", slow=True)
def gptj():
    from transformers import GPTJConfig, GPTJForCausalLM

    ids = token_ids()
    model = GPTJForCausalLM(GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, rotary_dim=4))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = token_ids()
    kwargs = {"input_ids": ids, "attention_mask": padding_mask(), "labels": ids}
    return LlamaForCausalLM(LlamaConfig(**GROUPED)), (), kwargs


@entry("transformers")
def llama_tied():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)), (token_ids(),), {}


@entry("transformers", slow=True)
def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8))
    return model, (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers")
def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ids = token_ids()
    return Qwen2ForCausalLM(Qwen2Config(**GROUPED)), (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return (
        Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
        (),
        {"input_ids": token_ids(), "attention_mask": padding_mask()},
    )


@entry("transformers", slow=True)
def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8, sliding_window=8))
    return model, (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers")
def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    ids = token_ids()
    model = Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers")
def phi():
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(PhiConfig(**TEXT)), (), {"input_ids": token_ids()}


@entry("transformers", slow=True)
def phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Phi3ForCausalLM(Phi3Config(**GROUPED, pad_token_id=0))
    return model, (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers", slow=True)
def opt():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=64, word_embed_proj_dim=16,
    )  # fmt: skip
    return OPTForCausalLM(config), (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers")
def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=4, n_head=4))
    return model, (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers", slow=True)
def falcon():
    from transformers import FalconConfig, FalconForCausalLM

    ids = token_ids()
    model = FalconForCausalLM(
        FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    )
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def stablelm():
    from transformers import StableLmConfig, StableLmForSequenceClassification

    model = StableLmForSequenceClassification(StableLmConfig(**GROUPED, num_labels=3, pad_token_id=0))
    return model, (), {"input_ids": token_ids(), "labels": torch.randint(0, 3, (sizes.BATCH,))}
