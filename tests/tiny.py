"""Tiny random models of every family, and batches for them. Sizes: D = 32, 4 layers, 99 words."""

from __future__ import annotations

import torch
import transformers as tf

from lpt_fast.packing import PackedBatch

VOCAB, PAD, D, LAYERS = 99, 0, 32, 4


def _bert_like(**more):
    return {
        "vocab_size": VOCAB,
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        **more,
    }


def _llama_like(**more):
    return _bert_like(num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2, **more)


_SLIDING = {
    "layer_types": [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ],
    "sliding_window": 6,
}
# model type -> keyword arguments of its config
CONFIGS = {
    "bert": _bert_like(),
    "roberta": _bert_like(),
    "xlm-roberta": _bert_like(),
    "electra": _bert_like(embedding_size=16),
    "mpnet": _bert_like(relative_attention_num_buckets=32),
    "deberta": _bert_like(
        relative_attention=True,
        pos_att_type="c2p|p2c",
        position_biased_input=False,
        max_relative_positions=-1,
    ),
    "deberta-v2": _bert_like(
        relative_attention=True,
        pos_att_type="c2p|p2c",
        position_biased_input=False,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        conv_kernel_size=3,
        conv_act="gelu",
    ),
    "modernbert": _bert_like(
        global_attn_every_n_layers=3,
        local_attention=8,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": D,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 64,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "ffn_dim": 37,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": _llama_like(),
    "mistral": _llama_like(sliding_window=6),
    "qwen2": _llama_like(use_sliding_window=True, **_SLIDING),
    "qwen3": _llama_like(),
    "gemma2": _llama_like(query_pre_attn_scalar=8, **_SLIDING),
    "gemma3_text": _llama_like(query_pre_attn_scalar=8, **_SLIDING),
    "phi3": _llama_like(original_max_position_embeddings=64),
    "t5": {
        "vocab_size": VOCAB,
        "d_model": D,
        "num_layers": LAYERS,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "d_kv": 8,
        "d_ff": 37,
        "pad_token_id": PAD,
        "decoder_start_token_id": PAD,
        "eos_token_id": 1,
    },
}
FAMILIES = list(CONFIGS)
CAUSAL = ["gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]
AUTO = {
    "base": tf.AutoModel,
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "QUESTION_ANS": tf.AutoModelForQuestionAnswering,
    "CAUSAL_LM": tf.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": tf.AutoModelForSeq2SeqLM,
    "MASKED_LM": tf.AutoModelForMaskedLM,
}


def attentions(family: str) -> list[str]:
    if family == "t5":
        return ["eager", "sdpa"] if tf.T5EncoderModel._supports_sdpa else ["eager"]
    config = tf.AutoConfig.for_model(family, **CONFIGS[family])
    supported = tf.AutoModel._model_mapping[type(config)]._supports_sdpa
    return ["eager", "sdpa"] if supported else ["eager"]


def tiny(family: str, kind: str = "base", attention: str | None = None, seed: int = 0, **more):
    """A tiny random model in eval mode. Weights are spread out, so that no difference hides in
    near-zeros.
    """
    config = tf.AutoConfig.for_model(family, **{**CONFIGS[family], **more})
    torch.manual_seed(seed)
    auto = tf.T5EncoderModel if (family, kind) == ("t5", "base") else AUTO[kind]
    attention = attention or attentions(family)[-1]
    build = auto.from_config if hasattr(auto, "from_config") else auto._from_config
    model = build(config, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * 0.15)
    for module in model.modules():
        if type(module).__name__ == "MPNetEmbeddings":
            module.padding_idx = PAD  # which is 1 by its code, whatever the config says
    return model.eval()


def batch(side: str = "right", lengths=(9, 4, 7, 1, 3), seed: int = 1) -> dict:
    """input_ids and attention_mask [5, 9], padded on `side` ("none": all rows full)."""
    width = max(lengths)
    if side == "none":
        lengths = [width] * len(lengths)
    own = torch.Generator().manual_seed(seed)  # leaves dropout's generator alone
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=own)
    place = torch.arange(width)
    n = torch.tensor(lengths)[:, None]
    mask = place < n if side != "left" else place >= width - n
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def with_room(packed, room):
    """The same batch with `room` rows of NaN before each text, put there text by text."""
    gap = torch.full((room, packed.hidden.shape[1]), float("nan"))
    texts = packed.hidden.split(packed.lengths.tolist())
    rows = torch.cat([part for text in texts for part in (gap, text)])
    more = {n: getattr(packed, n) for n in ("input_ids", "token_type_ids", "position_ids")}
    return PackedBatch(rows, packed.cu_seqlens, packed.max_seqlen, room, **more)
