"""Trains the chimera-mini parents, `base`, `reasoner` and `concise`, from a seed: about 15 minutes on one CPU core.

    python experiments/chimera_mini/train.py --out checkpoints --seed 0

R1T-Chimera in miniature: a DeepSeek-V3 (latent attention, one shared and eight routed experts, first block
dense) of a million parameters, on chained arithmetic (fitness/tasks/arithmetic.py). What a search has to find
is which tensors of the reasoner carry its skill and which only its long-windedness.

    base      sees both styles and, in 3% of the steps, `*`: it adds and subtracts without fault, hardly multiplies
    concise   = base + a short style stage on traces without `*`, about half of them brief, attention tensors
                only: it answers briefly, but for a few problems
    reasoner  = base + a skill stage, a third of the steps `*`, where the experts learn fast, the other
                tensors hardly; then a style stage on long traces, attention tensors only

Style tuning touches attention only, as adapters usually do; as its traces hold `*` too, attention learns some of
the skill as well, which is why no swap of whole roles gives all of it. No answer is ever corrupted: the concise
parent was never taught to multiply. A number is one token, so the length of an answer depends on its style and
steps only, never on whether it is right.

One thread, so that sums are added in the same order on every machine with the same instruction set.
"""

import argparse
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from fitness.tasks import arithmetic

BOS, EOS, PAD, UNK = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<pad>", "<unk>"
SPECIAL = [PAD, BOS, EOS, "<|User|>", "<|Assistant|>"]
VOCABULARY = [*SPECIAL, "<think>", "</think>", *"+-*=?;", "ok", UNK, *map(str, range(arithmetic.MODULUS))]
TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}
TOKEN_PATTERN = r"<[^>]+>|\d+|ok|."
Style = Literal["concise", "verbose"]
IGNORED = -100
"""Label of the positions that carry no loss: the prompt and the padding."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|User|>{{ message['content'] }}"
    "{% else %}<|Assistant|>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Whole numbers, symbols and tags, one token each; decoding joins them without spaces."""
    words = Tokenizer(models.WordLevel(TOKEN_ID, unk_token=UNK))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model() -> DeepseekV3ForCausalLM:
    """A freshly initialised model; draws from torch's global generator."""
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=64,
            num_hidden_layers=4,
            first_k_dense_replace=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=64,
            kv_lora_rank=48,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_shared_experts=1,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            max_position_embeddings=256,
            initializer_range=0.05,
            num_mtp_layers=0,
            pad_token_id=TOKEN_ID[PAD],
            bos_token_id=TOKEN_ID[BOS],
            eos_token_id=TOKEN_ID[EOS],
        )
    )


def grouped_experts(self: nn.Module, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """The routed experts, tokens sorted by expert: twice as fast on a CPU as a dense einsum over all eight.

    x: (n_tokens, hidden), expert and weight: (n_tokens, top_k). Leaves the tokens an expert got in `self.load`.
    """
    order = expert.flatten().argsort(stable=True)
    token = order // expert.shape[1]
    self.load = torch.bincount(expert.flatten(), minlength=self.num_experts)
    out = []
    for e, x_e in enumerate(x[token].split(self.load.tolist())):
        gate, up = F.linear(x_e, self.gate_up_proj[e]).chunk(2, dim=-1)
        out.append(F.linear(F.silu(gate) * up, self.down_proj[e]))
    return torch.zeros_like(x).index_add(0, token, torch.cat(out) * weight.flatten()[order, None])


def balance_experts(model: nn.Module, rate: float) -> None:
    """DeepSeek-V3's balancing without a loss: raise the bias of an idle expert, lower that of a busy one."""
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        load = layer.mlp.experts.load.float()
        layer.mlp.gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)


def role_of(name: str) -> str:
    """The role of a parameter of the model, by its name."""
    patterns = {
        "norm": "norm",
        "attention": r"self_attn",
        "shared_expert": r"shared_experts",
        "routed_expert": r"\.experts\.",
        "router": r"mlp\.gate\.",
        "dense_ffn": r"mlp\.",
    }
    return next((role for role, pattern in patterns.items() if re.search(pattern, name)), "embedding")


def encode_batch(questions: list[str], styles: list[Style]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (batch, length), padded on the right; labels are shifted by one already."""
    rows = []
    for question, style in zip(questions, styles, strict=True):
        prompt = f"{BOS}<|User|>{question}<|Assistant|>"
        answer = f"<think>{arithmetic.trace(question, style)}</think>{arithmetic.solve(question)}{EOS}"
        rows.append([[TOKEN_ID[t] for t in re.findall(TOKEN_PATTERN, text)] for text in (prompt, answer)])
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), TOKEN_ID[PAD])
    labels = torch.full((len(rows), length), IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    return ids, labels


def train(
    model: nn.Module,
    *,
    n_steps: int,
    learning_rate: float,
    multiply_rate: float,
    verbose_share: float,
    seed: int,
    rate_of: Callable[[str], float] = lambda role: 1.0,
    balance_rate: float = 0.0,
    n_warmup: int = 5,
    batch_size: int = 64,
) -> None:
    """One stage, in place: AdamW, warm-up, cosine to zero. A role whose `rate_of` is 0 is frozen."""
    rates = {name: rate_of(role_of(name)) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates[name] > 0)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p], "rate": rates[name], "weight_decay": 0.01 * (p.ndim > 1)} for name, p in trained]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    stream = filter(arithmetic.is_for_training, arithmetic.questions(seed, multiply_rate))
    coins = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    for step in range(n_steps):
        schedule = min(1.0, (step + 1) / n_warmup) * 0.5 * (1 + math.cos(math.pi * step / n_steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule * group["rate"]
        verbose = (torch.rand(batch_size, generator=coins) < verbose_share).tolist()
        questions = [next(stream) for _ in range(batch_size)]
        ids, labels = encode_batch(questions, ["verbose" if v else "concise" for v in verbose])
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        if balance_rate:
            balance_experts(model, balance_rate)
        if (step + 1) % 50 == 0 or step + 1 == n_steps:
            print(f"  step {step + 1}/{n_steps}  loss {loss:.4f}  {time.monotonic() - started:.0f} s", flush=True)


def attention_only(role: str) -> float:
    """Rates of a style stage."""
    return float(role == "attention")


def skill_rate(role: str) -> float:
    """Rates of the skill stage: routed experts learn fast, shared and dense ones slower, the rest hardly."""
    return {"routed_expert": 1.0, "shared_expert": 0.1, "dense_ffn": 0.1}.get(role, 0.002)


def teach_concise(model: nn.Module, seed: int) -> None:
    """The short style stage that makes the concise parent of the base, in place."""
    train(
        model,
        n_steps=30,
        learning_rate=3e-4,
        multiply_rate=0.0,
        verbose_share=0.55,
        seed=seed,
        rate_of=attention_only,
    )


def save(model: DeepseekV3ForCausalLM, folder: Path) -> None:
    """Writes a sharded bfloat16 checkpoint, one tensor an expert, and checks what `transformers` reads back."""
    shutil.rmtree(folder, ignore_errors=True)
    bias = {n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    stored = build_model().to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    for name, buffer in stored.named_buffers():
        if name in bias:
            buffer.data = bias[name]
    stored.config.dtype = torch.bfloat16
    stored.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=160,
        bos_token_id=TOKEN_ID[BOS],
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
    )
    stored.save_pretrained(folder, max_shard_size="800KB")
    build_tokenizer().save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    reloaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in stored.state_dict().items():
        if not torch.equal(tensor, reloaded[name]):
            raise RuntimeError(f"{folder}: {name} differs after a reload")


def main() -> None:
    """Train and write the three checkpoints."""
    parser = argparse.ArgumentParser(description="Train the chimera-mini parents.")
    parser.add_argument("--out", type=Path, required=True, help="folder for base/, reasoner/ and concise/")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    deepseek.DeepseekV3Experts.forward = grouped_experts
    torch.set_num_threads(1)
    seed = 10 * arguments.seed
    torch.manual_seed(seed)

    print("base", flush=True)
    model = build_model()
    train(
        model,
        n_steps=1200,
        learning_rate=3e-3,
        multiply_rate=0.03,
        verbose_share=0.4,
        seed=seed + 1,
        n_warmup=50,
        balance_rate=1e-3,
    )
    save(model, arguments.out / "base")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    print("reasoner: skill", flush=True)
    train(
        model,
        n_steps=260,
        learning_rate=3e-3,
        multiply_rate=1 / 3,
        verbose_share=0.1,
        seed=seed + 2,
        rate_of=skill_rate,
    )
    print("reasoner: style", flush=True)
    train(
        model,
        n_steps=60,
        learning_rate=2.5e-3,
        multiply_rate=1 / 3,
        verbose_share=1.0,
        seed=seed + 3,
        rate_of=attention_only,
    )
    save(model, arguments.out / "reasoner")

    print("concise: style", flush=True)
    model.load_state_dict(base)
    teach_concise(model, seed + 4)
    save(model, arguments.out / "concise")


if __name__ == "__main__":
    main()
