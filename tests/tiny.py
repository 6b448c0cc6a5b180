"""Tiny random models of every supported class, and the tolerances all tests share."""

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

FLOAT64 = 1e-12
"""Relative error allowed where both sides compute in float64: a few hundred roundings of 1e-16."""
FLOAT32 = 1e-5
"""Relative error allowed where both sides compute in float32: 1e-7 per rounding, summed over widths up to 10^3."""

_COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}
_GQA = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}

MODELS = {
    "llama": (transformers.LlamaConfig, _GQA, ["q_proj", "v_proj"], ["q_proj", "k_proj", "down_proj", "gate_proj"]),
    "mistral": (transformers.MistralConfig, _GQA, ["q_proj", "v_proj"], ["o_proj", "up_proj"]),
    "qwen2": (transformers.Qwen2Config, _GQA, ["q_proj", "v_proj"], ["k_proj", "down_proj"]),
    "qwen3": (transformers.Qwen3Config, {**_GQA, "head_dim": 16}, ["q_proj", "v_proj"], ["k_proj", "o_proj"]),
    "gemma": (transformers.GemmaConfig, {**_GQA, "head_dim": 8}, ["q_proj", "v_proj"], ["o_proj", "down_proj"]),
    "phi": (transformers.PhiConfig, _GQA, ["q_proj", "v_proj"], ["dense", "fc1", "fc2"]),
    "phi3": (transformers.Phi3Config, {**_GQA, "pad_token_id": 0}, ["qkv_proj"], ["o_proj", "gate_up_proj"]),
    "gpt_neox": (
        transformers.GPTNeoXConfig,
        {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 64},
        ["query_key_value"],
        ["attention.dense", "dense_h_to_4h"],
    ),
    "opt": (
        transformers.OPTConfig,
        {**_COMMON, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
        ["q_proj", "v_proj"],
        ["out_proj", "fc1", "fc2"],
    ),
    "gpt2": (
        transformers.GPT2Config,
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 64},
        ["c_attn"],
        ["attn.c_proj", "c_fc", "mlp.c_proj"],
    ),
    "bert": (
        transformers.BertConfig,
        {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 64},
        ["query", "value"],
        ["attention.output.dense", "intermediate.dense"],
    ),
    "roberta": (
        transformers.RobertaConfig,
        {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 66},
        ["query", "value"],
        ["key", "attention.output.dense"],
    ),
}
"""name -> (config class, its arguments, the paper's targets, other targets)."""
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Input widths of whole 64-blocks, which 4-bit storage on a CPU needs."""


def tiny_model(name, *, seed=0, dtype=torch.float32, **changes):
    """A random model in train mode with dropout off; its weights are large enough for the layers to matter."""
    config_class, arguments, _, _ = MODELS[name]
    config = config_class(**{**arguments, **changes})
    for key in vars(config):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    config.initializer_range = 0.2
    auto = AutoModelForMaskedLM if name in ("bert", "roberta") else AutoModelForCausalLM
    torch.manual_seed(seed)
    return auto.from_config(config).to(dtype).train()


def tokens(batch=2, length=11, seed=0, vocab=97):
    """Random token ids (batch, length)."""
    return torch.randint(2, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomise(adapter, seed=0, scale=0.3):
    """Give every core random values, so that no factor is zero or an identity."""
    generator = torch.Generator().manual_seed(seed)
    adapter.set_cores([scale * torch.randn(c.shape, generator=generator, dtype=c.dtype) for c in adapter.cores])


def relative(got, expected):
    """Relative error in the norm."""
    return ((got - expected).norm() / expected.norm()).item()
