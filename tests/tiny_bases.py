"""Random bases of many model types, as folders."""

from pathlib import Path

import torch
from tiny import chatml_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 2, "dff": 64},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3_moe": {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "bert": {"is_decoder": True},
}
COMMON = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_base(folder: Path, kind: str, positions: int = 512, tokenizer=None, **fields) -> Path:
    """A base of this model type, with a tokenizer."""
    tokenizer = tokenizer or chatml_tokenizer()
    own = SIZES.get(kind, {})
    sizes = own if "n_embd" in own or "num_layers" in own else COMMON | own
    length = "n_positions" if "n_embd" in own else "max_position_embeddings"
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), length: positions} | sizes | fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
