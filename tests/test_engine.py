"""The engine against model.generate and fresh loads, which are independent of its decoding loop."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fitness.engines.transformers import TransformersEngine, find_slots
from fitness.evaluator import Evaluator
from fitness.types import Finish, Problem
from tests.conftest import CONFIGS, make_checkpoint

PROMPTS = ["1+2", "7", "12*3-4+5", "9-9", "44+4*4", "3"]


def reference_ids(path, prompt, max_tokens):
    """model.generate, one prompt at a time: no batch, no padding."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return tokenizer, out[0, ids.shape[1] :].tolist()


@pytest.fixture
def engine(parents):
    return TransformersEngine(str(parents["a"]), dtype="float32", device="cpu", batch_size=4)


def test_greedy_text_equals_generate(parents, engine):
    completions = engine.generate(PROMPTS, max_tokens=24)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        tokenizer, ids = reference_ids(parents["a"], prompt, 24)
        assert completion.n_tokens == len(ids)
        assert completion.finish == (Finish.STOP if ids[-1] == 2 else Finish.LENGTH)
        assert completion.text == tokenizer.decode(ids[:-1] if ids[-1] == 2 else ids)


def test_rows_that_stop_early_do_not_change_the_others(tmp_path):
    """A model that stops at very different times: its stop token is made likely."""
    path = make_checkpoint(tmp_path / "m", "llama", 5, dtype=torch.float32, shard="1GB")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[2] *= 1.6
    model.save_pretrained(path)
    engine = TransformersEngine(str(path), dtype="float32", device="cpu", batch_size=16)
    prompts = [f"{i}+{j}*{k}" for i in range(4) for j in (1, 55) for k in (2, 777)]
    completions = engine.generate(prompts, max_tokens=60)
    assert len({c.n_tokens for c in completions}) > 4
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.n_tokens == len(reference_ids(path, prompt, 60)[1])


def test_slots_are_views_under_the_published_names(parents):
    from evo.checkpoint import Checkpoint

    model = AutoModelForCausalLM.from_pretrained(parents["a"], dtype=torch.float32)
    slots, checkpoint = find_slots(model), Checkpoint.open(parents["a"])
    for name in checkpoint.headers:
        assert torch.equal(slots[name], checkpoint.tensor(name).float())
    for name in checkpoint.headers:
        slots[name].fill_(0.5)
    assert all(torch.all(p == 0.5) for p in model.parameters())


@pytest.mark.parametrize("config", CONFIGS)
def test_counts_thinking_tokens(config, tmp_path):
    engine = TransformersEngine(str(make_checkpoint(tmp_path, config, 0)), dtype="float32", device="cpu")
    assert engine._text.completion([6, 7, 5, 8, 2], 10).n_think_tokens == 3  # "</think>" is token 5
    assert engine._text.completion([6, 7, 8, 2], 10).n_think_tokens == 0


def test_a_limit_that_no_prompt_leaves_room_for_is_refused(engine):
    task, problems = (
        SimpleNamespace(prompt=lambda problem: problem.question),
        [Problem("1" * n, "") for n in (200, 150)],
    )
    Evaluator(engine, task, 103).check(problems)
    with pytest.raises(ValueError, match=r"of 2 prompts, none .* of 104 tokens .*: lower max_tokens to 103 or less"):
        Evaluator(engine, task, 104).check(problems)
    with pytest.raises(ValueError, match="ask for shorter prompts"):
        Evaluator(engine, task, 1).check([Problem("1" * 300, "")])


def test_what_finds_no_room_in_pieces_of_a_gpus_memory_is_tried_once_more(engine, monkeypatch):
    expected, decode, emptied = engine.generate(PROMPTS, max_tokens=8), engine._decoder.decode, []

    def full(*arguments):
        if not emptied:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(engine._decoder, "decode", full)
    assert engine.generate(PROMPTS, max_tokens=8) == expected and len(emptied) == 1
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    emptied.clear()
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(PROMPTS, max_tokens=8)


def test_collapsed_weights_are_reported_and_leave_the_engine_usable(engine):
    before = engine.generate(PROMPTS, max_tokens=8)
    slot = engine.slots()["model.norm.weight"]
    kept = slot.clone()
    slot.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        engine.generate(PROMPTS, max_tokens=8)
    slot.copy_(kept)
    assert engine.generate(PROMPTS, max_tokens=8) == before


def test_update_before_host_says_so(engine):
    with pytest.raises(RuntimeError, match="host"):
        engine.update({})


def test_no_chat_template_means_plain_text(tmp_path):
    path = make_checkpoint(tmp_path / "m", "llama", 0)
    (path / "chat_template.jinja").unlink()
    engine = TransformersEngine(str(path), dtype="float32", device="cpu")
    assert engine._text.encode("1+2") == [7, 16, 8]


@pytest.mark.parametrize("options", [{"attn_implementaton": "eager"}, {"attn_implementation": [1]}])
def test_options_that_transformers_does_not_take_are_named(parents, options):
    with pytest.raises(
        ValueError, match=rf"^engine.options: .*{next(iter(options))}.*expected arguments of from_pretr"
    ):
        TransformersEngine(str(parents["a"]), dtype="float32", device="cpu", options=options)
