"""Dense architectures whose checkpoints both sides merge, and with which files."""

from transformers import CONFIG_MAPPING, PretrainedConfig

_USUAL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_FURTHER = {
    **{name: {} for name in ("mistral", "qwen2", "phi", "phi3", "gpt_neox", "starcoder2", "olmo2", "stablelm", "cohere",
                             "cohere2", "granite", "apertus", "arcee")},
    **{name: {"head_dim": 8} for name in ("qwen3", "gemma", "gemma2", "gemma3_text", "glm4")},
    "llama": {"tie_word_embeddings": True},
    "falcon": {"new_decoder_architecture": False},
    "mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
}  # fmt: skip
"""Model type -> what its configuration has besides the usual."""
SHOWN = (
    "linear, weights that do not sum to 1",
    "slerp, the model cards' usual t",
    "ties, the base among the models, filters",
    "passthrough, layers in their place, scaled",
    "model_stock",
)
"""Names of files."""


def configs() -> dict[str, PretrainedConfig]:
    """Model type -> configuration of a tiny model of three layers."""
    found = {name: CONFIG_MAPPING[name](**_USUAL, **further) for name, further in _FURTHER.items()}
    return found | {name: CONFIG_MAPPING[name](**_GPT2) for name in ("gpt2", "gpt_bigcode")}
