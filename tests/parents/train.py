"""Trains the parents that searches in the tests merge: about six minutes on one CPU core.

    python tests/parents/train.py --out tests/parents

The skills and styles of chimera-mini (experiments/chimera_mini/train.py, whose batches and stages these are) in a
dense Llama of two blocks: a token costs a quarter as much, so tests can search for as long as they need to. The
reasoner answers nearly all right in some 80 tokens, the concise parent a third of them in 30.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "chimera_mini"))
from train import (  # a script, no package
    BOS,
    EOS,
    PAD,
    TOKEN_ID,
    VOCABULARY,
    attention_only,
    build_tokenizer,
    teach_concise,
    train,
)


def build_model() -> LlamaForCausalLM:
    """A freshly initialised model; draws from torch's global generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            initializer_range=0.05,
            pad_token_id=TOKEN_ID[PAD],
            bos_token_id=TOKEN_ID[BOS],
            eos_token_id=TOKEN_ID[EOS],
        )
    )


def skill_rate(role: str) -> float:
    """Rates of the skill stage: feed-forward tensors learn, the rest hardly."""
    return 1.0 if role == "dense_ffn" else 0.002


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes a sharded bfloat16 checkpoint with its tokenizer."""
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.config.dtype = torch.bfloat16
    stored.save_pretrained(folder, max_shard_size="200KB")
    build_tokenizer().save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> None:
    """Train and write the three checkpoints."""
    parser = argparse.ArgumentParser(description="Train the parents of the tests.")
    parser.add_argument("--out", type=Path, required=True, help="folder for base/, reasoner/ and concise/")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(0)

    print("base", flush=True)
    model = build_model()
    train(model, n_steps=600, learning_rate=3e-3, multiply_rate=0.03, verbose_share=0.4, seed=1, n_warmup=50)
    save(model, out / "base")
    base = copy.deepcopy(model.state_dict())

    print("reasoner: skill, style", flush=True)
    skill, style = {"verbose_share": 0.1, "rate_of": skill_rate}, {"verbose_share": 1.0, "rate_of": attention_only}
    train(model, n_steps=200, learning_rate=2e-3, multiply_rate=1 / 3, seed=2, **skill)
    train(model, n_steps=60, learning_rate=2.5e-3, multiply_rate=1 / 3, seed=3, **style)
    save(model, out / "reasoner")

    print("concise: style", flush=True)
    model.load_state_dict(base)
    teach_concise(model, seed=4)
    save(model, out / "concise")


if __name__ == "__main__":
    main()
