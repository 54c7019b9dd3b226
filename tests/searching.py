"""Searches, what they record, and what plain transformers says of a checkpoint."""

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evo.ledger import Ledger
from fitness.tasks.arithmetic import solve
from fitness.types import Split
from tests.conftest import PARENTS

SIZES = {"search": 24, "reserve": 8, "held_out": 40}
MAX_TOKENS = 110


def write_config(folder: Path, *, parents: Path = PARENTS, optimizer="{kind: cma_es, population: 5}", candidates=14):
    text = f"""\
parents: {{reasoner: {parents}/reasoner, concise: {parents}/concise}}
base: {parents}/base
task: {{kind: arithmetic, search: {SIZES["search"]}, reserve: {SIZES["reserve"]}, held_out: {SIZES["held_out"]}}}
engine: {{dtype: float32, device: cpu, batch_size: 64, max_tokens: {MAX_TOKENS}, threads: 1}}
optimizer: {optimizer}
budget: {{candidates: {candidates}}}
tracking: {{enabled: false}}
seed: 3
"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.yaml").write_text(text)
    return folder / "search.yaml"


def events(folder: Path):
    """All that a run recorded, but for times and seconds."""
    with closing(Ledger.open(folder, read_only=True)) as ledger:
        asks = [
            (a.id, a.generation, a.name, a.recipe, None if a.genome is None else a.genome.tobytes())
            for a in ledger.asks()
        ]
        entries = [
            (e.candidate_id, e.split, e.status, e.losses, e.violations, e.summary, e.detail.get("samples"))
            for split in Split
            for e in ledger.entries(split)
        ]
        scores = [ledger.score(e).verdicts.tobytes() for s in Split for e in ledger.entries(s) if e.losses]
    return asks, sorted(entries, key=lambda e: (e[1], e[0])), sorted(scores)


def search_entries(search):
    return [e for e in events(search.folder)[1] if e[1] is Split.SEARCH]


def generate_with_transformers(checkpoint: Path, questions):
    """Accuracy and tokens by model.generate, one question at a time: nothing of ours but the questions."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    n_tokens, correct = [], []
    for question in questions:
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
        answer = out[0, ids.shape[1] :]
        n_tokens.append(len(answer))
        said = tokenizer.decode(answer, skip_special_tokens=True).replace(" ", "").rpartition("</think>")[2]
        correct.append(said == str(solve(question)))
    return np.array(correct), np.array(n_tokens)
