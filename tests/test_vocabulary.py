"""Vocabularies that differ by added and padded rows."""

import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from evo.checkpoint import Checkpoint, CheckpointError
from evo.compatible import check_compatible
from evo.export import write_checkpoint
from evo.materializer import Materializer
from evo.merge_file import merge
from evo.mergekit.writer import write_mergekit
from evo.shards import Shard
from fitness.engines.transformers import TransformersEngine
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import VOCABULARY, make_checkpoint
from tests.encoding import files_of
from tests.test_materializer import sources_of

N = len(VOCABULARY)
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")


def grow(folder, out, n_rows, added=()):
    """A checkpoint with rows behind its own, and tokens (token -> id) that the tokenizer knows besides."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = files_of(folder)
    for name in BY_TOKEN:
        tensors[name] = torch.cat([tensors[name], torch.randn(n_rows - len(tensors[name]), 32).bfloat16()])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": n_rows}))
    data = json.loads((out / "tokenizer.json").read_text())
    data["added_tokens"] += [{**data["added_tokens"][0], "id": i, "content": t} for t, i in dict(added).items()]
    (out / "tokenizer.json").write_text(json.dumps(data))
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    small, other = (make_checkpoint(folder / f"{seed}", "llama", seed) for seed in (0, 1))
    return {
        "small": small,
        "padded": grow(other, folder / "padded", N + 10),
        "added": grow(other, folder / "added", N + 4, {"<tool>": N, "<end>": N + 1}),
        "taught": grow(make_checkpoint(folder / "2", "llama", 2), folder / "taught", N + 10, {"<think>": N + 2}),
        "clash": grow(other, folder / "clash", N + 10, {"<other>": N + 2}),
    }


def opened(folders, *names):
    return {name: Checkpoint.open(folders[name]) for name in names}


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("small", "padded"), rf"embed_tokens\.weight: rows {N} to {N + 9} are in padded only. `vocabulary: common`"),
        (("added", "small"), rf"2 row\(s\) are in added only: {N} \('<tool>'\), {N + 1} \('<end>'\)"),
        (("padded", "taught"), rf"1 row\(s\) are in taught only: {N + 2} \('<think>'\)"),
    ],
)
def test_refused_with_the_rows_named_and_allowed_on_request(folders, names, match):
    with pytest.raises(CheckpointError, match=match):
        check_compatible(opened(folders, *names))
    check_compatible(opened(folders, *names), common_rows=True)


def test_two_tokens_for_one_row_are_refused_always(folders):
    with pytest.raises(CheckpointError, match=re.escape("'<other>', '<think>'")):
        check_compatible(opened(folders, "taught", "clash"), common_rows=True)


def test_other_shapes_are_refused_always(folders, tmp_path):
    tensors = files_of(folders["small"])
    folder = shutil.copytree(folders["small"], tmp_path / "odd")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:16].clone()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    save_file(tensors, folder / "model.safetensors")
    checkpoints = {"small": Checkpoint.open(folders["small"]), "odd": Checkpoint.open(folder)}
    with pytest.raises(CheckpointError, match=r"2 difference\(s\)"):
        check_compatible(checkpoints, common_rows=True)


@pytest.mark.parametrize("interface", ["small", "padded", "taught"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_common_rows_are_merged_and_the_others_are_the_interfaces(folders, interface, method, tmp_path):
    names = ("small", "padded", "taught")
    parents = {name: folders[name] for name in names}
    rule = Rule(method, {"padded": 0.5, "taught": 0.25}, knobs={"density": 0.5} if method == "ties" else {})
    recipe = Recipe(sources_of(parents), "small", interface, (rule,))
    write_checkpoint(recipe, opened(folders, *names), tmp_path / "out")
    merged, files = files_of(tmp_path / "out"), {name: files_of(path) for name, path in parents.items()}
    for name in BY_TOKEN:
        theirs = files[interface][name]
        assert merged[name].shape == theirs.shape
        assert torch.equal(merged[name][N:], theirs[N:])
        if method != "ties":
            values = {n: f[name][:N].double().numpy() for n, f in files.items()}
            exact = 0.25 * values["small"] + 0.5 * values["padded"] + 0.25 * values["taught"]
            assert np.abs(merged[name][:N].double().numpy() - exact).max() <= 2.0**-8 * np.abs(exact).max()
        assert not torch.equal(merged[name][:N], theirs[:N])
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    engine = TransformersEngine(str(parents[interface]), dtype="float32", device="cpu")
    engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
    engine.update(recipe.to_dict())
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(engine._model.state_dict()[name], tensor), name


@pytest.mark.parametrize("interface", ["padded", "taught"])
@pytest.mark.parametrize("names", [("small", "padded", "taught"), ("padded", "taught")])
def test_shards_of_common_rows(folders, names, interface):
    """Cut below, at and above where the smallest vocabulary ends; without it, beside a row that only one knows."""
    rule = Rule("ties", dict.fromkeys(names[1:], 0.5), knobs={"density": 0.5})
    recipe = Recipe(sources_of({name: folders[name] for name in names}), names[0], interface, (rule,))
    name, sources = BY_TOKEN[0], opened(folders, *names)
    expected = dict(Materializer(sources).stream(recipe))[name]
    for cuts in ([0, 7, N + 3, N + 10], [0, N, N + 2, N + 10]):
        shards = [Shard(torch.empty(b - a, 32).bfloat16(), slice(a, b)) for a, b in pairwise(cuts)]
        Materializer(sources, {name: shards}, partial=True).write(recipe.to_dict())
        assert torch.equal(torch.cat([shard.slot for shard in shards]), expected)


def test_a_row_that_one_parent_has_no_token_for_is_the_interfaces(folders, tmp_path):
    names = ("padded", "taught")
    recipe = Recipe(
        {n: s for n, s in sources_of(folders).items() if n in names},
        "padded",
        "taught",
        (Rule("linear", {"taught": 0.5}),),
    )
    write_checkpoint(recipe, opened(folders, *names), tmp_path / "out")
    merged, taught = files_of(tmp_path / "out"), files_of(folders["taught"])
    for name in BY_TOKEN:
        equal = (merged[name] == taught[name]).all(1)
        assert equal.nonzero().flatten().tolist() == [N + 2]


def test_padding_that_mergekit_cuts_off_is_said(folders, tmp_path):
    """Where its file names a tokenizer: then it makes embeddings of its own, with a row for each token."""
    parents = {"base": grow(folders["small"], tmp_path / "base", N + 10), "a": folders["padded"]}
    models = "".join(f"- {{model: {path}}}\n" for path in parents.values())
    text = f"merge_method: linear\nparameters: {{weight: 0.5}}\nmodels:\n{models}"
    (tmp_path / "recipe.yaml").write_text(text)
    said = "mergekit cuts off the 10 rows"
    assert not any(said in line for line in merge(tmp_path / "recipe.yaml", tmp_path / "out").lines)
    (tmp_path / "recipe.yaml").write_text(f"{text}tokenizer_source: base\n")
    told = merge(tmp_path / "recipe.yaml", tmp_path / "out", force=True)
    assert any(f"tokenizer_source: {said}" in line for line in told.lines)
    named = {name: Source(str(path)) for name, path in parents.items()}
    recipe = Recipe(named, "base", "a", (Rule("ties", {"a": 0.5}),))
    _, notes = write_mergekit(recipe, {name: Checkpoint.open(path) for name, path in parents.items()})
    assert any("tokenizer_source cuts off the 10 rows" in note for note in notes)
