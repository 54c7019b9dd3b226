"""What every engine must hold, whatever it runs on: exact weights, exact text, and no harm from an interrupt."""

import functools
import inspect
import pkgutil
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chi2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from evo.checkpoint import Checkpoint
from evo.materializer import Materializer
from evo.merge.cpp_loop import find_compiler
from fitness.engines import ENGINES
from fitness.types import Decoding, Finish
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import CONFIGS_OF_ENGINES, make_checkpoint
from tests.engines import KINDS, OPTIONAL, module_of, resident, running
from tests.test_engine import PROMPTS, reference_ids

MANY = [f"{a}{op}{b}" for a in (1, 23, 456) for op in "+-*" for b in (7, 89)]


@pytest.fixture(scope="module", params=CONFIGS_OF_ENGINES)
def parents(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make = CONFIGS_OF_ENGINES[request.param]
    return {name: make_checkpoint(folder / name, make(), seed) for seed, name in enumerate(["base", "a", "b"])}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "a", CONFIGS_OF_ENGINES["llama"](), 3)


def recipe(parents, share, blocks=None):
    sources = {name: Source(str(path)) for name, path in parents.items()}
    return Recipe(sources, "b", "a", (Rule("linear", {"a": share}, blocks=blocks),))


def export(recipe, parents, folder):
    """A checkpoint of a recipe, written by safetensors from the materializer's stream: no engine involved."""
    folder.mkdir()
    for file in parents["a"].iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, folder)
    sources = {name: Checkpoint.open(path) for name, path in parents.items()}
    save_file(dict(Materializer(sources).stream(recipe)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ids(engine):
    return [list(completion.token_ids) for completion in engine.generate(PROMPTS, max_tokens=16)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_text_are_those_of_the_export_even_after_twenty_updates(kind, dtype, parents, tmp_path):
    rng, found = np.random.default_rng(0), {}
    with running(kind, parents["a"], dtype=dtype) as engine:
        engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
        for i in range(20):
            wanted = recipe(parents, float(rng.random()), blocks=(int(rng.integers(3)),) if i % 3 else None)
            report = engine.update(wanted.to_dict())
            assert report.n_written > 0 and report.seconds > 0  # what the writer says comes back
            if i in (0, 19):
                folder = export(wanted, parents, tmp_path / str(i))
                exported = Checkpoint.open(folder)
                weights = resident(engine, exported)
                for name in exported.headers:
                    assert torch.equal(weights[name], exported.tensor(name).to(weights[name].dtype)), name
                found[folder] = ids(engine)
    for folder, texts in found.items():
        with running(kind, folder, dtype=dtype) as fresh:
            assert texts == ids(fresh)
        if dtype == "float32" and (kind != "vllm" or "deepseek" not in str(parents["a"])):
            assert texts == [reference_ids(folder, prompt, 16)[1] for prompt in PROMPTS]


@pytest.mark.skipif(find_compiler() is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_has_the_text_of_the_export_after_updates(tmp_path):
    config = CONFIGS_OF_ENGINES["llama"]()
    config.num_hidden_layers = 2  # each more takes the compiler many seconds
    parents = {name: make_checkpoint(tmp_path / name, config, seed) for seed, name in enumerate(["a", "b"])}
    counters = torch._dynamo.utils.counters
    counters.clear()
    with running("transformers", parents["a"], compile=True) as engine:
        engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
        for share in (0.3, 0.8):
            engine.update(recipe(parents, share).to_dict())
            folder = export(recipe(parents, share), parents, tmp_path / str(share))
            assert ids(engine) == [reference_ids(folder, prompt, 16)[1] for prompt in PROMPTS]
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_interrupted_or_fails_leaves_the_engine_usable(kind, parents):
    """Ctrl-C in mid-generation, a recipe that cannot be written, and a merge whose logits are not finite."""
    good = recipe(parents, 0.3).to_dict()
    with running(kind, parents["a"]) as engine:
        engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
        engine.update(good)
        before = engine.generate(MANY, max_tokens=12)
        model, calls = module_of(engine), []
        forward = model.forward

        @functools.wraps(forward)  # model.generate looks at its parameters
        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == 7:
                raise KeyboardInterrupt
            return forward(*args, **kwargs)

        model.forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            engine.generate(MANY, max_tokens=12)
        del model.forward
        assert engine.generate(MANY, max_tokens=12) == before
        with pytest.raises(ValueError, match="no such method"):
            engine.update({**good, "rules": [{**good["rules"][0], "method": "no such method"}]})
        assert engine.generate(MANY, max_tokens=12) == before
        engine.update(recipe(parents, 3e38).to_dict())
        with pytest.raises(FloatingPointError):
            engine.generate(MANY, max_tokens=12)
        engine.update(good)
        assert engine.generate(MANY, max_tokens=12) == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_logit_is_a_collapsed_merge_even_without_a_nan(kind, tmp_path):
    folder = make_checkpoint(tmp_path / "a", CONFIGS_OF_ENGINES["llama"](), 3, shard="1GB")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = 100.0
    weights["lm_head.weight"][7:9, 0] = torch.tensor([3e38, -3e38])  # of either sign, one of the two is +inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 3, 7, 8, 4]])).logits
    assert logits.isposinf().any() and not logits.isnan().any()
    with running(kind, folder) as engine, pytest.raises(FloatingPointError):
        engine.generate(PROMPTS, max_tokens=4)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_the_same_in_any_batch_and_differ_between_seeds(kind, llama):
    """A row's draw depends on its seed and step, not on its neighbours."""
    decoding = Decoding(greedy=False, temperature=1.3, top_p=0.95)
    seeds, texts = [2**64 - 1 - i for i in range(len(MANY))], []
    for size, order in ((1, 1), (5, -1)):
        with running(kind, llama, batch_size=size, decoding=decoding) as engine:
            texts.append(engine.generate(MANY[::order], max_tokens=12, seeds=seeds[::order])[::order])
            other = engine.generate(MANY, max_tokens=12, seeds=[s - 100 for s in seeds])
    assert texts[0] == texts[1] != other


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_probabilities_that_transformers_gives_tokens(kind, llama):
    decoding = Decoding(greedy=False, temperature=1.4, top_k=10, top_p=0.85, repetition_penalty=1.3)
    n, prompt, tokenizer = 2000, "12+345", AutoTokenizer.from_pretrained(llama)
    message = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    cuts = {"temperature": 1.4, "top_k": 10, "top_p": 0.85, "repetition_penalty": 1.3, "do_sample": True}
    with torch.inference_mode():
        out = model.generate(
            asked, **cuts, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, pad_token_id=0
        )
    expected = n * out.scores[0][0].double().softmax(0).numpy()
    with running(kind, llama, batch_size=64, decoding=decoding) as engine:
        seeds = np.random.default_rng(0).integers(2**63, size=n).tolist()
        drawn = [c.token_ids[0] for c in engine.generate([prompt] * n, max_tokens=1, seeds=seeds)]
    observed, kept = np.bincount(drawn, minlength=len(expected)), expected > 0
    assert 4 < kept.sum() < 10 and not observed[~kept].any()
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < chi2.isf(1e-4, kept.sum() - 1)


def test_capabilities_are_declared():
    known = {"generate", "logprobs", "routing", "paths"}
    for name, target in ENGINES.items():
        found = pkgutil.resolve_name(target).capabilities
        assert "generate" in found and found <= known, name


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_engines_of_our_own_have_every_option_whose_tests_would_skip(kind):
    assert set(inspect.signature(pkgutil.resolve_name(ENGINES[kind])).parameters) >= OPTIONAL


@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_is_that_of_a_plain_forward_pass(kind, llama):
    if "logprobs" not in pkgutil.resolve_name(ENGINES[kind]).capabilities:
        pytest.skip(f"{kind} has no logprobs")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    prompts, answers = ["1+2", "34*5-6"], ["3;", "12=7+"]
    with running(kind, llama) as engine:
        likelihoods = engine.log_likelihood(prompts, answers)
    for prompt, answer, found in zip(prompts, answers, likelihoods, strict=True):
        message = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = torch.tensor([[*asked, *tokenizer(answer, add_special_tokens=False)["input_ids"], 2]])
        with torch.inference_mode():
            nats = torch.log_softmax(model(ids).logits[0].double(), -1)
        expected = sum(float(nats[i - 1, ids[0, i]]) for i in range(len(asked), ids.shape[1]))
        assert found.total == pytest.approx(expected, abs=1e-3)
        assert found.n_tokens == len(answer) + 1
        assert found.blind == pytest.approx(-np.log(nats.shape[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_end_a_completion_and_are_cut_off(kind, llama):
    with running(kind, llama) as engine:
        free = engine.generate(MANY, max_tokens=30)
    string = max((c.text for c in free), key=len)[5:7]
    with running(kind, llama, decoding=Decoding(stop=(string,))) as engine:
        stopped = engine.generate(MANY, max_tokens=30)
    assert any(string in without.text for without in free) and any(string not in without.text for without in free)
    for with_stop, without in zip(stopped, free, strict=True):
        if string in without.text:
            assert with_stop.finish is Finish.STOP
            assert with_stop.text == without.text[: without.text.find(string)]
            assert with_stop.n_tokens <= without.n_tokens
        else:
            assert with_stop == without


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_special_token_is_a_stop_string_too(kind, llama):
    special = AutoTokenizer.from_pretrained(llama).bos_token
    with running(kind, llama) as engine:
        free = engine.generate(MANY, max_tokens=30)
    with running(kind, llama, decoding=Decoding(stop=(special,))) as engine:
        stopped = engine.generate(MANY, max_tokens=30)
    assert any(special in completion.text for completion in free)
    for with_stop, without in zip(stopped, free, strict=True):
        ids = list(without.token_ids)
        assert list(with_stop.token_ids) == (ids[: ids.index(1) + 1] if 1 in ids else ids)
        assert with_stop.text == without.text.partition(special)[0]


def write_words(folder):
    """Beside a model of the tests, a tokenizer whose words hold the space before them, and whose first one drops it."""
    words = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "</think>", *(f"▁{c}" for c in "abcdefgh"), *"abcdefgh"]
    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    whole.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = AutoTokenizer.from_pretrained(folder).chat_template
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_what_counts_as_cut_off_has_all_its_tokens_where_the_first_word_drops_its_space(kind, tmp_path):
    """A stop string that begins with a space is then in the text of an answer to a prompt, not in that of an answer."""
    folder = make_checkpoint(tmp_path / "a", CONFIGS_OF_ENGINES["llama"](), 7)
    write_words(folder)
    with running(kind, folder) as engine:
        first = engine.generate(["a b"], max_tokens=1)[0]
    word = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(first.token_ids[0])
    assert word.startswith("▁") and word == f"▁{first.text}"
    with running(kind, folder, decoding=Decoding(stop=(f" {first.text}",))) as engine:
        for completion in engine.generate(["a b", "c", "d e f g"], max_tokens=20):
            assert completion.n_tokens == len(completion.token_ids)
            assert completion.finish is (Finish.LENGTH if completion.n_tokens == 20 else Finish.STOP)
            assert f" {first.text}" not in completion.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_without_room_is_one_failed_completion(kind, llama):
    with running(kind, llama) as engine:
        completions = engine.generate(["1" * 300, "7"], max_tokens=100)
        assert [engine.room(prompts) for prompts in (["1" * 300, "7"], ["1" * 200], ["1" * 300])] == [252, 53, 0]
        (cut,) = engine.generate(["1" * 200], max_tokens=100)  # as a proxy may ask, of problems with room
    assert len(cut.token_ids) <= 53 and (cut.finish is Finish.STOP or cut.n_tokens == 100)
    assert (completions[0].text, completions[0].n_tokens, completions[0].finish) == ("", 100, Finish.LENGTH)
    assert completions[1].token_ids
