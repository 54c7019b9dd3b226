"""What every engine must hold, whatever it runs on: exact weights, exact text, and no harm from an interrupt."""

import pkgutil

import numpy as np
import pytest
import torch

from evo.checkpoint import Checkpoint
from evo.materializer import Materializer
from fitness.engines import ENGINES
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import make_checkpoint
from tests.test_engine import PROMPTS, reference_ids

MANY = [f"{a}{op}{b}" for a in (1, 23, 456) for op in "+-*" for b in (7, 89)]


@pytest.fixture(params=ENGINES)
def engine(request, parents):
    engine = pkgutil.resolve_name(ENGINES[request.param])(
        str(parents["a"]), dtype="float32", device="cpu", batch_size=4
    )
    engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
    return engine


def recipe(parents, share, blocks=None):
    sources = {name: Source(str(path)) for name, path in parents.items()}
    return Recipe(sources, "b", "a", (Rule("linear", {"a": share}, blocks=blocks),))


def export(recipe, parents, folder):
    """A checkpoint of a recipe, written by safetensors from the materializer's stream: no engine involved."""
    import shutil

    from safetensors.torch import save_file

    folder.mkdir()
    for file in parents["a"].iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, folder)
    sources = {name: Checkpoint.open(path) for name, path in parents.items()}
    save_file(dict(Materializer(sources).stream(recipe)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_and_text_are_those_of_the_export_even_after_twenty_updates(engine, parents, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(20):
        wanted = recipe(parents, float(rng.random()), blocks=(int(rng.integers(3)),) if i % 3 else None)
        engine.update(wanted.to_dict())
        if i in (0, 19):
            folder = export(wanted, parents, tmp_path / str(i))
            exported, slots = Checkpoint.open(folder), engine.slots()
            for name in exported.headers:
                assert torch.equal(slots[name], exported.tensor(name).to(slots[name].dtype)), name
            for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, max_tokens=16), strict=True):
                assert list(completion.token_ids) == reference_ids(folder, prompt, 16)[1]


def test_an_interrupted_generation_leaves_the_engine_usable(engine):
    before = engine.generate(MANY, max_tokens=12)
    calls, forward = [], engine._model.forward

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    engine._model.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate(MANY, max_tokens=12)
    engine._model.forward = forward
    assert engine.generate(MANY, max_tokens=12) == before


def test_draws_are_the_same_in_any_batch_and_differ_between_seeds(parents):
    """A row's draw depends on its seed and step, not on its neighbours."""
    from fitness.types import Decoding

    for target in ENGINES.values():
        make = pkgutil.resolve_name(target)
        decoding = Decoding(greedy=False, temperature=1.3, top_p=0.95)
        seeds = list(range(1000, 1000 + len(MANY)))
        texts = []
        for size, order in ((1, 1), (4, 1), (5, -1)):
            engine = make(str(parents["a"]), dtype="float32", device="cpu", batch_size=size, decoding=decoding)
            texts.append(engine.generate(MANY[::order], max_tokens=12, seeds=seeds[::order])[::order])
        assert texts[0] == texts[1] == texts[2]
        assert engine.generate(MANY, max_tokens=12, seeds=[s + 1 for s in seeds]) != texts[0]


def test_capabilities_are_declared():
    known = {"generate", "logprobs", "routing", "paths"}
    for name, target in ENGINES.items():
        found = pkgutil.resolve_name(target).capabilities
        assert "generate" in found and found <= known, name


@pytest.mark.parametrize("stop", ["eos", "string"])
def test_stop_strings_end_a_completion_and_are_cut_off(tmp_path, stop):
    from fitness.types import Decoding, Finish

    path = make_checkpoint(tmp_path / "m", "llama", 3, dtype=torch.float32, shard="1GB")
    for target in ENGINES.values():
        make = pkgutil.resolve_name(target)
        free = make(str(path), dtype="float32", device="cpu", batch_size=4).generate(MANY, max_tokens=30)
        whole = max((c.text for c in free), key=len)
        string = whole[5:7] if stop == "string" else "never in these texts"
        engine = make(str(path), dtype="float32", device="cpu", batch_size=4, decoding=Decoding(stop=(string,)))
        for with_stop, without in zip(engine.generate(MANY, max_tokens=30), free, strict=True):
            if string in without.text:
                assert with_stop.finish is Finish.STOP
                assert with_stop.text == without.text[: without.text.find(string)]
                assert with_stop.n_tokens <= without.n_tokens
            else:
                assert with_stop == without
