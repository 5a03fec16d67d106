"""Encoders of text, of transformers."""

from __future__ import annotations

import torch

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import TEXT, VOCAB, padding_mask, token_ids


@entry("transformers")
def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**TEXT)), (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers")
def bert_pretraining():
    from transformers import BertConfig, BertForPreTraining

    ids = token_ids()
    kwargs = {"input_ids": ids, "labels": ids, "next_sentence_label": torch.randint(0, 2, (sizes.BATCH,))}
    return BertForPreTraining(BertConfig(**TEXT)), (), kwargs


@entry("transformers", slow=True)
def roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = RobertaForSequenceClassification(RobertaConfig(**TEXT, num_labels=3))
    return model, (token_ids(),), {"attention_mask": padding_mask(), "labels": torch.randint(0, 3, (sizes.BATCH,))}


@entry("transformers", slow=True)
def electra():
    from transformers import ElectraConfig, ElectraForTokenClassification

    model = ElectraForTokenClassification(ElectraConfig(**TEXT, embedding_size=16, num_labels=5))
    return model, (token_ids(),), {"attention_mask": padding_mask()}


@entry("transformers")
def deberta_v2():
    from transformers import DebertaV2Config, DebertaV2ForQuestionAnswering

    config = DebertaV2Config(**TEXT, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"])
    return DebertaV2ForQuestionAnswering(config), (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers")
def albert():
    from transformers import AlbertConfig, AlbertModel

    return (
        AlbertModel(AlbertConfig(**TEXT, embedding_size=16)),
        (),
        {"input_ids": token_ids(), "attention_mask": padding_mask()},
    )


@entry("transformers")
def distilbert():
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    ids = token_ids()
    model = DistilBertForMaskedLM(DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=4, n_heads=4, hidden_dim=64))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def mpnet():
    from transformers import MPNetConfig, MPNetModel

    return MPNetModel(MPNetConfig(**TEXT)), (token_ids(),), {}


@entry("transformers", slow=True)
def modernbert():
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(**TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    return ModernBertForMaskedLM(config), (), {"input_ids": token_ids(), "attention_mask": padding_mask()}


@entry("transformers")
def fnet():
    from transformers import FNetConfig, FNetForMaskedLM

    config = FNetConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, intermediate_size=64)
    return FNetForMaskedLM(config), (), {"input_ids": token_ids()}


@entry("transformers")
def layoutlm():
    from transformers import LayoutLMConfig, LayoutLMForTokenClassification

    corner = torch.randint(0, 400, (sizes.BATCH, 12, 2))
    boxes = torch.cat([corner, corner + torch.randint(1, 400, (sizes.BATCH, 12, 2))], dim=-1)
    model = LayoutLMForTokenClassification(LayoutLMConfig(**TEXT, num_labels=4))
    return model, (), {"input_ids": token_ids(), "bbox": boxes, "attention_mask": padding_mask()}


@entry("transformers")
def longformer():
    from transformers import LongformerConfig, LongformerModel

    model = LongformerModel(LongformerConfig(**TEXT, attention_window=8))
    return model, (), {"input_ids": token_ids(32), "attention_mask": padding_mask(32)}


@entry("transformers", slow=True)
def big_bird():
    from transformers import BigBirdConfig, BigBirdForMaskedLM

    config = BigBirdConfig(**TEXT, block_size=4, num_random_blocks=1)
    return BigBirdForMaskedLM(config), (), {"input_ids": token_ids(64), "attention_mask": padding_mask(64)}


@entry("transformers")
def xlnet():
    from transformers import XLNetConfig, XLNetLMHeadModel

    ids = token_ids()
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=3, n_head=4, d_inner=64))
    return model, (), {"input_ids": ids, "labels": ids}


@entry("transformers", slow=True)
def funnel():
    from transformers import FunnelConfig, FunnelModel

    config = FunnelConfig(vocab_size=VOCAB, block_sizes=[2, 2, 1], d_model=32, n_head=4, d_head=8, d_inner=64)
    return FunnelModel(config), (), {"input_ids": token_ids(16), "attention_mask": padding_mask(16)}


@entry("transformers")
def perceiver():
    from transformers import PerceiverConfig, PerceiverForMaskedLM

    config = PerceiverConfig(
        vocab_size=VOCAB, num_latents=8, d_latents=32, d_model=32, num_self_attends_per_block=3,
        num_self_attention_heads=4, num_cross_attention_heads=4, qk_channels=32, v_channels=32,
        max_position_embeddings=16,
    )  # fmt: skip
    return PerceiverForMaskedLM(config), (), {"inputs": token_ids(16), "attention_mask": padding_mask(16)}
