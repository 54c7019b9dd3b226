"""Refill, sampling, stop strings and memory, against model.generate and formulas."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GenerationConfig, MistralConfig

from evo.planning.machine import device_of
from evo.planning.plan import PlanError
from fitness.engines.columns import Columns
from fitness.engines.memory import rows_that_fit
from fitness.engines.sampling import Sampler, Settings, uniforms
from fitness.engines.transformers import TransformersEngine
from fitness.types import Decoding, Finish
from tests.conftest import _COMMON, CONFIGS, make_checkpoint
from tests.test_engine import reference_ids

PROMPTS = [f"{a}{'+12' * (i % 5)}" for i, a in enumerate(range(1, 400, 17))]
CONFIGS_WITH_WINDOWS = {
    "mistral": lambda: MistralConfig(**_COMMON, hidden_size=32, intermediate_size=48, sliding_window=6),
    "gemma3": lambda: Gemma3TextConfig(
        **_COMMON, hidden_size=32, intermediate_size=48, head_dim=16, sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}  # fmt: skip


def uneven(path, factor=1.6):
    """Make the stop token of a checkpoint likely, so that rows end at very different times."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[2] *= factor
    model.save_pretrained(path)
    return path


@pytest.fixture(params=[*CONFIGS, *CONFIGS_WITH_WINDOWS])
def checkpoint(request, tmp_path, monkeypatch):
    for name, config in CONFIGS_WITH_WINDOWS.items():
        monkeypatch.setitem(CONFIGS, name, config)
    path = make_checkpoint(tmp_path / "m", request.param, 5, dtype=torch.float32, shard="1GB")
    return path if "tied" in request.param or request.param == "gemma3" else uneven(path)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_refilled_text_equals_generate(checkpoint, batch_size):
    engine = TransformersEngine(str(checkpoint), dtype="float32", device="cpu", batch_size=batch_size)
    completions = engine.generate(PROMPTS, max_tokens=40)
    assert [list(c.token_ids) for c in completions] == [reference_ids(checkpoint, p, 40)[1] for p in PROMPTS]


def test_text_equals_generate_where_rows_are_parked(checkpoint, monkeypatch):
    """Levels of 6, 12, 24, ... tokens: rows come and go all the time."""
    monkeypatch.setattr("fitness.engines.decoding.LEAST_TOKENS", 0)
    monkeypatch.setattr("fitness.engines.decoding.lowest_level", lambda *_: 6)
    parked = []
    monkeypatch.setattr(Columns, "join_again", lambda *args, f=Columns.join_again: parked.append(1) or f(*args))
    engine = TransformersEngine(str(checkpoint), dtype="float32", device="cpu", batch_size=3)
    completions = engine.generate(PROMPTS, max_tokens=40)
    assert [list(c.token_ids) for c in completions] == [reference_ids(checkpoint, p, 40)[1] for p in PROMPTS]
    assert parked


def test_rows_are_refilled(checkpoint):
    """Fewer forward passes than batches decoded to their end would take."""
    engine = TransformersEngine(str(checkpoint), dtype="float32", device="cpu", batch_size=4)
    calls, forward = [], engine._model.forward
    engine._model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    lengths = [c.n_tokens for c in engine.generate(PROMPTS, max_tokens=40)]
    static = sum(max(lengths[i : i + 4]) for i in range(0, len(lengths), 4))
    if len(set(lengths)) > 5:
        assert len(calls) < static + len(lengths)
        assert sum(lengths) / 4 <= len(calls)


def test_a_model_that_cannot_be_refilled_is_decoded_batch_by_batch(tmp_path, monkeypatch):
    path = uneven(make_checkpoint(tmp_path / "m", "llama", 5, dtype=torch.float32, shard="1GB"))
    monkeypatch.setattr("fitness.engines.transformers.is_columnar", lambda config: False)
    monkeypatch.setattr("fitness.engines.columns.Columns.__init__", lambda self: pytest.fail("used"))
    engine = TransformersEngine(str(path), dtype="float32", device="cpu", batch_size=4)
    completions = engine.generate(PROMPTS, max_tokens=40)
    assert [list(c.token_ids) for c in completions] == [reference_ids(path, p, 40)[1] for p in PROMPTS]


def test_the_cache_is_gone_when_generate_returns(tmp_path):
    """Without waiting for Python to look for cycles: the next one may not fit beside it."""
    path = make_checkpoint(tmp_path / "m", "llama", 5, dtype=torch.float32, shard="1GB")
    engine = TransformersEngine(str(path), dtype="float32", device="cpu", batch_size=4)
    gc.collect()
    gc.disable()
    try:
        engine.generate(PROMPTS, max_tokens=4)
        assert not [found for found in gc.get_objects() if type(found) is Columns]
    finally:
        gc.enable()


@given(st.data())
def test_columns_hold_what_lists_hold(data):
    """Rows join, grow, leave and come back at random; a list of lists is the reference."""
    capacity, cache, rows, value = 5, Columns(5, [(torch.zeros(1, 1, 1),) * 2]), [], iter(range(1, 10**6))
    parked = []

    def forward(new):
        states = torch.tensor(new, dtype=torch.float32)[:, None, :, None]
        return cache.update(states, -states, 0)

    for _ in range(data.draw(st.integers(1, 25))):
        n_free = capacity - len(rows)
        if parked and n_free and data.draw(st.booleans()):
            back, parked = parked[:n_free], parked[n_free:]
            cache.join_again([copy for _, copy in back])
            rows += [row for row, _ in back]
        elif not rows or (n_free and data.draw(st.booleans())):
            prompts = [
                [next(value) for _ in range(data.draw(st.integers(1, 40)))]
                for _ in range(data.draw(st.integers(1, n_free)))
            ]
            width = max(map(len, prompts))
            cache.join(len(prompts), width)
            forward([[0] * (width - len(p)) + p for p in prompts])
            rows += prompts
        elif data.draw(st.booleans()):
            cache.step(max(map(len, rows)))
            new = [next(value) for _ in rows]
            keys, values = forward([[n] for n in new])
            for row, n in zip(rows, new, strict=True):
                row.append(n)
            for i, row in enumerate(rows):
                assert keys[i, 0, -len(row) :, 0].tolist() == row
                assert values[i, 0, -len(row) :, 0].tolist() == [-n for n in row]
        else:
            gone = data.draw(st.lists(st.sampled_from(range(len(rows))), unique=True, min_size=1))
            if data.draw(st.booleans()):
                parked += [(rows[i], cache.copied(i, len(rows[i]))) for i in gone]
            order = cache.drop(gone)
            assert sorted(order) == sorted(set(range(len(rows))) - set(gone))
            rows = [rows[i] for i in order]


def test_all_buffers_of_a_cache_are_there_before_a_forward_pass():
    """Made in the middle of it, they lay between its temporaries: 80 MB of holes beside 72 MB of keys and values."""
    cache = Columns(3, [(torch.zeros(2, 1, 4), torch.zeros(2, 1, 6)), (torch.zeros(1, 1, 8),) * 2])
    cache.join(3, 700)
    shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers]
    assert shapes == [((3, 2, 732, 4), (3, 2, 732, 6)), ((3, 1, 732, 8),) * 2]


class TestSampling:
    LOGITS = torch.tensor([[1.0, 2.0, 0.5, -1.0, 1.5]])

    def draw(self, decoding, n=20_000, generation=None):
        sampler = Sampler(Settings.of(generation or GenerationConfig(do_sample=True), decoding))
        seeds = np.arange(n, dtype=np.uint64) * np.uint64(7919)
        logits = self.LOGITS.expand(n, -1)
        history = torch.zeros(n, 1, dtype=torch.long)
        return torch.bincount(sampler(logits, history, seeds, np.zeros(n, np.int64)), minlength=5) / n

    def test_frequencies_are_the_softmax(self):
        for temperature in (0.5, 1.0, 2.0):
            found = self.draw(Decoding(temperature=temperature))
            assert torch.allclose(found, torch.softmax(self.LOGITS[0] / temperature, -1), atol=0.015)

    def test_what_is_cut_off_is_never_drawn(self):
        assert (self.draw(Decoding(top_k=2)) > 0).tolist() == [False, True, False, False, True]
        p = torch.softmax(self.LOGITS[0], -1)
        assert (self.draw(Decoding(min_p=0.5)) > 0).tolist() == (p >= 0.5 * p.max()).tolist()
        assert (self.draw(Decoding(top_p=0.6)) > 0).tolist() == [False, True, False, False, True]  # 0.42 + 0.26 > 0.6

    def test_the_generation_config_is_the_default(self):
        config = GenerationConfig(do_sample=True, temperature=0.5, top_k=3)
        assert torch.equal(self.draw(Decoding(), generation=config), self.draw(Decoding(temperature=0.5, top_k=3)))
        assert self.draw(Decoding(greedy=True), generation=config)[1] == 1.0
        assert self.draw(Decoding(), generation=GenerationConfig())[1] == 1.0  # do_sample is not set: greedy

    def test_what_nothing_would_be_drawn_with_is_refused(self):
        config, wanted = GenerationConfig(do_sample=False), {"temperature": 0.6, "top_p": 0.9}
        with pytest.raises(ValueError, match=r"decoding sets temperature, top_p.*do_sample: false.*decoding.greedy to"):
            Settings.of(config, Decoding(**wanted))
        assert Settings.of(config, Decoding(**wanted, greedy=False)).temperature == 0.6
        assert Settings.of(config, Decoding(**wanted, greedy=True)).greedy

    def test_what_is_not_followed_is_refused(self):
        with pytest.raises(ValueError, match="no_repeat_ngram_size"):
            Settings.of(GenerationConfig(no_repeat_ngram_size=3), Decoding())
        with pytest.raises(ValueError, match="all samples would be the same"):
            Settings.of(GenerationConfig(), Decoding(samples=4))
        for bad in (
            {"temperature": 0.0},
            {"top_p": 2.0},
            {"samples": 0},
            {"greedy": True, "samples": 2},
            {"stop": ("",)},
        ):
            with pytest.raises(ValueError, match="decoding"):
                Decoding(**bad)

    def test_uniforms_are_splitmix64(self):
        """First outputs of SplitMix64 seeded with 1234567, as its authors' C code prints them."""
        known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
        found = uniforms(np.full(4, 1234567, np.uint64), np.arange(4))
        assert found.tolist() == [(k >> 11) * 2.0**-53 for k in known]


def test_repetition_penalty_equals_generate(tmp_path):
    path = uneven(make_checkpoint(tmp_path / "m", "llama", 5, dtype=torch.float32, shard="1GB"), 1.2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    decoding = Decoding(repetition_penalty=1.7)
    engine = TransformersEngine(str(path), dtype="float32", device="cpu", batch_size=3, decoding=decoding)
    plain = TransformersEngine(str(path), dtype="float32", device="cpu", batch_size=3)
    completions = engine.generate(PROMPTS, max_tokens=20)
    assert completions != plain.generate(PROMPTS, max_tokens=20)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([tokenizer(f"<s><user>{prompt}<assistant>", add_special_tokens=False)["input_ids"]])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, repetition_penalty=1.7)
        assert list(completion.token_ids) == out[0, ids.shape[1] :].tolist()


class TestContext:
    @pytest.fixture
    def engine(self, tmp_path):
        return TransformersEngine(
            str(make_checkpoint(tmp_path / "m", "llama", 0)), dtype="float32", device="cpu", batch_size=2
        )

    def test_a_prompt_without_room_is_one_failed_problem(self, engine):
        """The context is 256 tokens; templates add 3."""
        fits, tight, none = engine.generate(["1+2", "1" * 250, "1" * 300], max_tokens=60)
        assert fits == engine.generate(["1+2"], max_tokens=60)[0]
        assert len(tight.token_ids) <= 3 and len(none.token_ids) == 0
        assert none.finish is Finish.LENGTH and none.n_tokens == 60
        assert tight.finish is Finish.STOP or tight.n_tokens == 60

    def test_no_prompts(self, engine):
        assert engine.generate([], max_tokens=5) == []


@pytest.mark.parametrize(
    ("n", "device", "found"), [(0, "cuda", "no GPU"), (1, "cuda:1", "GPU 0 only"), (2, "cuda:2", "GPUs 0 to 1 only")]
)
def test_a_gpu_that_is_not_there(n, device, found, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    with pytest.raises(ValueError, match=f"device '{device}' was asked for, but torch sees {found} here"):
        TransformersEngine(str(tmp_path), device=device)
    with pytest.raises(PlanError, match=f"engine.device is '{device}', but torch sees {found} here"):
        device_of({"device": device})
    assert device_of({"device": f"cuda:{n - 1}"}).index == n - 1 if n else device_of({}).type == "cpu"


class TestBatchSize:
    def test_rows_fit_into_half_the_memory(self):
        cpu, gpu = torch.device("cpu"), torch.device("cuda")
        assert rows_that_fit(2**20, 2**30, cpu) == 128  # the cap
        assert rows_that_fit(2**24, 2**30, cpu) == 8  # 512 MB / 2.5 / 16 MB = 12.8
        assert rows_that_fit(2**40, 2**30, cpu) == 1
        assert rows_that_fit(2**20, 2**33, gpu) == 512

    def test_it_is_found_once(self, tmp_path, monkeypatch):
        path = make_checkpoint(tmp_path / "m", "llama", 0)
        engine = TransformersEngine(str(path), dtype="float32", device="cpu", batch_size="auto")
        assert engine.batch_size is None
        engine.generate(["1"], max_tokens=4)
        assert engine.batch_size == 128
        monkeypatch.setattr("fitness.engines.transformers.free_bytes", lambda device: 1)
        engine.generate(["1"], max_tokens=4)
        assert engine.batch_size == 128

    @pytest.mark.parametrize("config", ["llama", "deepseek_v3"])
    def test_memory_of_a_token_by_formula(self, tmp_path, monkeypatch, config):
        asked = []
        monkeypatch.setattr("fitness.engines.transformers.rows_that_fit", lambda row, *_: asked.append(row) or 1)
        path = make_checkpoint(tmp_path / "m", config, 0)
        engine = TransformersEngine(str(path), dtype="float32", device="cpu", batch_size="auto")
        engine.generate(["1"], max_tokens=96)  # and 4 of the prompt
        c = CONFIGS[config]()
        # Three layers. Llama: two heads, keys and values of 16. DeepSeek: a latent of 8 and a rotary part of 8.
        per_token = {"llama": 3 * 2 * (16 + 16) * 4, "deepseek_v3": 3 * (8 + 8) * 4}[config]
        assert asked == [100 * per_token + 8 * 4 * c.vocab_size]
