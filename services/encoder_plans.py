"""How text encoders of transformers are cut in tensor parallelism, by the names of their modules: data for families."""

from __future__ import annotations

from services.family import EncoderPlan

# T5 and UMT5. The table is tied to the first one, which no forward reads.
T5 = EncoderPlan(
    attention=("*.SelfAttention",),
    column=("*.SelfAttention.[qkv]", "*.wi", "*.wi_[01]"),
    row=("*.SelfAttention.o", "*.wo"),
    tables=("*embed_tokens",),
    unused=("shared",),
)
LLAMA = EncoderPlan(
    attention=("*.self_attn",),
    column=("*.self_attn.q_proj", "*.mlp.gate_proj", "*.mlp.up_proj"),
    row=("*.self_attn.o_proj", "*.mlp.down_proj"),
    tables=("*embed_tokens",),
    unused=("lm_head",),
)
# Llama's names for words; the part that sees has queries, keys and values in one linear.
QWEN_VL = EncoderPlan(
    attention=("*.self_attn", "*.visual.blocks.*.attn"),
    column=(*LLAMA.column, "*.attn.qkv", "*.merger.mlp.0"),
    row=(*LLAMA.row, "*.attn.proj", "*.merger.mlp.2"),
    segments={"*.attn.qkv": (1, 1, 1)},
    tables=LLAMA.tables,
    unused=LLAMA.unused,
)
