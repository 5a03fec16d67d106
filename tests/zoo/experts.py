"""Mixtures of experts, of transformers."""

from __future__ import annotations

from zoo.registry import entry
from zoo.sizes import GROUPED, TEXT, VOCAB, padding_mask, token_ids


@entry("transformers")
def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    ids = token_ids()
    kwargs = {"input_ids": ids, "attention_mask": padding_mask(), "labels": ids}
    return MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4)), (), kwargs


@entry("transformers", slow=True)
def mixtral_router_loss():
    from transformers import MixtralConfig, MixtralForCausalLM

    ids = token_ids()
    model = MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4, output_router_logits=True))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def qwen2_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **GROUPED, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    )
    return Qwen2MoeForCausalLM(config), (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers", slow=True)
def olmoe():
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeForCausalLM(OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2)), (token_ids(),), {}


@entry("transformers")
def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    return GptOssForCausalLM(config), (), {"input_ids": token_ids()}


@entry("transformers", slow=True)
def deepseek_v3():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **TEXT, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config), (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers", slow=True)
def switch_transformers():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_sparse_encoder_layers=2, num_decoder_layers=4,
        num_sparse_decoder_layers=2, num_heads=4, num_experts=4, decoder_start_token_id=0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config), (), {"input_ids": token_ids(), "labels": token_ids(8)}
