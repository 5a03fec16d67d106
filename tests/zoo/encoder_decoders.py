"""Encoders and decoders of text in one model, of transformers."""

from __future__ import annotations

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import SEQ2SEQ, TEXT, VOCAB, padding_mask, token_ids


@entry("transformers")
def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=SEQ2SEQ["d_model"], d_kv=SEQ2SEQ["d_model"] // 4, d_ff=SEQ2SEQ["encoder_ffn_dim"],
        num_layers=3, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip
    labels = token_ids(sizes.TOKENS * 2 // 3)
    kwargs = {"input_ids": token_ids(), "attention_mask": padding_mask(), "labels": labels}
    return T5ForConditionalGeneration(config), (), kwargs


@entry("transformers", slow=True)
def t5_checkpointed():
    model, args, kwargs = t5()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model, args, kwargs


@entry("transformers", slow=True)
def t5_gated_untied():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), (), {"input_ids": token_ids(), "decoder_input_ids": token_ids(8)}


@entry("transformers")
def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    kwargs = {"input_ids": token_ids(), "attention_mask": padding_mask(), "labels": token_ids(8)}
    return BartForConditionalGeneration(BartConfig(**SEQ2SEQ)), (), kwargs


@entry("transformers", slow=True)
def marian():
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(**SEQ2SEQ, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    return (
        MarianMTModel(config),
        (),
        {"input_ids": token_ids(), "attention_mask": padding_mask(), "decoder_input_ids": token_ids(8)},
    )


@entry("transformers", slow=True)
def pegasus():
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    model = PegasusForConditionalGeneration(PegasusConfig(**SEQ2SEQ))
    return model, (), {"input_ids": token_ids(), "labels": token_ids(8)}


@entry("transformers", slow=True)
def m2m_100():
    from transformers import M2M100Config, M2M100Model

    model = M2M100Model(M2M100Config(**SEQ2SEQ))
    return model, (), {"input_ids": token_ids(), "attention_mask": padding_mask(), "decoder_input_ids": token_ids(8)}


@entry("transformers")
def bert_to_bert():
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**TEXT), BertConfig(**TEXT))
    return EncoderDecoderModel(config=config), (), {"input_ids": token_ids(), "decoder_input_ids": token_ids(8)}
