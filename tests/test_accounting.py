"""Exact accounting: where each tensor of an export came from, and its hash, by the files alone."""

import json

import pytest

from evo.accounting import ACCOUNTING_FILE
from evo.checkpoint import Checkpoint, CheckpointError
from evo.export import write_checkpoint
from evo.merge_file import RecipeError, merge
from search_spaces.layout import Role
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import VOCABULARY, make_checkpoint
from tests.encoding import files_of, to_fp8
from tests.packing import pack, store_head
from tests.test_export import hashes, write_recipe
from tests.test_unscored import MTP, with_mtp
from tests.test_vocabulary import grow

RULES = (
    Rule("linear", {"a": 0.5}, roles=(Role.ATTENTION,), blocks=(1,)),
    Rule("linear", {"a": 1.0, "b": 0.0}, roles=(Role.ROUTED_EXPERT, Role.FFN)),
    Rule("ties", {"a": 0.6, "b": 0.5}, tensors=("*.input_layernorm.weight",)),
)


def test_every_tensor_is_accounted_for_and_nothing_else_changes(parents, tmp_path):
    told = merge(write_recipe(tmp_path, parents, *RULES), tmp_path / "out")
    found, sources = hashes(tmp_path / "out"), {name: hashes(path) for name, path in parents.items()}
    accounting = json.loads((tmp_path / "out" / ACCOUNTING_FILE).read_text())
    assert accounting["tensors"].keys() == found.keys() == sources["base"].keys()
    counts = dict.fromkeys(["merged", "copied", "passed through"], 0)
    for name, account in accounting["tensors"].items():
        assert account["blake3"] == found[name]
        counts[account["how"]] += 1
        if "self_attn" in name and ".1." in name:
            assert account["how"] == "merged" and account["sources"] == ["base", "a"] and account["rules"] == [0]
            assert account["methods"] == ["linear"] and found[name] != sources["base"][name]
        elif "input_layernorm" in name:
            assert account["how"] == "merged" and account["rules"] == [2]
        elif ".experts." in name or (".mlp." in name and "gate." not in name and "shared" not in name):
            assert account["how"] == "copied" and account["sources"] == ["a"] and account["rules"] == [1]
            assert found[name] == sources["a"][name]
        else:
            assert account["how"] == "passed through" and account["sources"] == ["base"] and account["rules"] == []
            assert found[name] == sources["base"][name]
    assert all(counts.values())
    for line in (accounting["summary"], told.lines[0]):
        assert line.startswith(f"{len(found)} tensors: ") and f"{counts['copied']} copied from a" in line
        assert f"{counts['passed through']} passed through from base" in line
    assert accounting["summary"] in (tmp_path / "out" / "README.md").read_text()


def test_tensors_that_a_method_leaves_as_they_are_are_copies(parents, tmp_path):
    """Assembly of Experts merges those that differ by more than delta."""
    values = {name: {k: t.double() for k, t in files_of(path).items()} for name, path in parents.items()}
    distances = {k: (values["a"][k] - t).square().mean().sqrt().item() for k, t in values["base"].items()}
    delta = sorted(distances.values())[len(distances) // 2]
    rule = Rule("aoe", {"a": 0.5}, knobs={"delta": delta})
    told = merge(write_recipe(tmp_path, parents, rule), tmp_path / "out")
    accounting = json.loads((tmp_path / "out" / ACCOUNTING_FILE).read_text())
    copied = {k for k, t in accounting["tensors"].items() if t["how"] == "copied" and t["sources"] == ["base"]}
    assert copied == {k for k, distance in distances.items() if distance <= delta} != distances.keys()
    before, after = hashes(parents["base"]), hashes(tmp_path / "out")
    assert copied == {k for k in before if after[k] == before[k]}
    said = f"{len(copied)} copied from base"
    assert all(said in text for text in (told.lines[0], accounting["summary"]))
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_packed_experts_with_rules_of_their_own(moe_parents, tmp_path):
    parents = {name: pack(path, tmp_path / name) for name, path in moe_parents.items()}
    rules = [Rule("linear", {"a": 1.0}, blocks=(1,), experts=(0, 1)), Rule("linear", {"a": 0.5}, experts=(2,))]
    merge(write_recipe(tmp_path, parents, *rules), tmp_path / "out")
    accounts = json.loads((tmp_path / "out" / ACCOUNTING_FILE).read_text())["tensors"]
    account = accounts["model.layers.1.mlp.experts.down_proj"]
    assert account["how"] == "merged" and account["sources"] == ["a", "base"] and account["rules"] == [0, 1]
    merge(write_recipe(tmp_path, parents, rules[0]), tmp_path / "out", force=True)
    accounts = json.loads((tmp_path / "out" / ACCOUNTING_FILE).read_text())["tensors"]
    account = accounts["model.layers.1.mlp.experts.down_proj"]
    assert account["how"] == "merged" and account["sources"] == ["a", "base"]  # of two sources, bit for bit
    assert accounts["model.layers.2.mlp.experts.down_proj"]["how"] == "passed through"


def test_a_tied_head_follows_its_embedding(tmp_path):
    parents = {
        name: store_head(make_checkpoint(tmp_path / f"{name}0", "llama_tied", seed), tmp_path / name)
        for seed, name in enumerate(["base", "a"])
    }
    merge(write_recipe(tmp_path, parents, Rule("linear", {"a": 0.5}, roles=(Role.EMBEDDING,))), tmp_path / "out")
    accounts = json.loads((tmp_path / "out" / ACCOUNTING_FILE).read_text())["tensors"]
    assert accounts["lm_head.weight"] == accounts["model.embed_tokens.weight"]
    assert accounts["lm_head.weight"]["how"] == "merged"


def accounts_of(folder):
    return json.loads((folder / ACCOUNTING_FILE).read_text())["tensors"]


def test_fp8_numbers_and_scales_are_accounted_for_one_by_one(tmp_path):
    parents = {}
    for seed, name in enumerate(["base", "a"]):
        plain = make_checkpoint(tmp_path / f"{name}0", "deepseek_v3", seed)
        parents[name] = to_fp8(plain, tmp_path / name)
    rules = (Rule("linear", {"a": 0.5}, tensors=("*.o_proj.weight",)), Rule("linear", {"a": 1.0}, blocks=(1,)))
    merge(write_recipe(tmp_path, parents, *rules), tmp_path / "out")
    found, accounts = hashes(tmp_path / "out"), accounts_of(tmp_path / "out")
    sources = {name: hashes(path) for name, path in parents.items()}
    assert {name: account["blake3"] for name, account in accounts.items()} == found
    assert found.keys() == sources["base"].keys()
    n_scales = 0
    for name, account in accounts.items():
        n_scales += name.endswith("_scale_inv")
        assert account["how"] == accounts[name.removesuffix("_scale_inv")]["how"]
        if ".o_proj." in name:
            assert account["how"] == "merged" and account["sources"] == ["base", "a"]
            assert found[name] not in (sources["base"][name], sources["a"][name])
        elif ".layers.1." in name:
            assert account["how"] == "copied" and found[name] == sources["a"][name]
        else:
            assert account["how"] == "passed through" and found[name] == sources["base"][name]
    assert n_scales > 10


def test_what_text_does_not_use_is_the_interface_parents_or_follows_what_it_copies(tmp_path):
    """Multi-token prediction that the interface parent alone has, in a file of its own."""
    parents = {
        name: make_checkpoint(tmp_path / f"{name}0", "deepseek_v3", seed) for seed, name in enumerate(["base", "a"])
    }
    parents["a"] = with_mtp(parents["a"], tmp_path / "a")
    told = merge(write_recipe(tmp_path, parents, Rule("linear", {"a": 0.5}, roles=(Role.HEAD,))), tmp_path / "out")
    found, accounts = hashes(tmp_path / "out"), accounts_of(tmp_path / "out")
    sources = {name: hashes(path) for name, path in parents.items()}
    assert found.keys() == accounts.keys() == sources["a"].keys() > sources["base"].keys()
    assert accounts[MTP + "shared_head.head.weight"] == accounts["lm_head.weight"]
    assert accounts["lm_head.weight"]["how"] == "merged"
    assert accounts[MTP + "embed_tokens.weight"] == accounts["model.embed_tokens.weight"]
    assert accounts["model.embed_tokens.weight"]["how"] == "passed through"
    unscored = {name for name in sources["a"].keys() - sources["base"].keys() if "embed" not in name}
    for name in unscored - {MTP + "shared_head.head.weight"}:
        assert accounts[name]["how"] == "unscored" and accounts[name]["sources"] == ["a"]
    assert {name: account["blake3"] for name, account in accounts.items()} == found
    assert f"{len(unscored) - 1} unscored from a" in told.lines[0]


def test_rows_that_only_some_have(tmp_path):
    small, other = (make_checkpoint(tmp_path / f"{seed}", "llama", seed) for seed in (0, 1))
    parents = {"base": small, "a": grow(other, tmp_path / "a", len(VOCABULARY) + 10)}
    file = write_recipe(tmp_path, parents, Rule("linear", {"a": 0.5}, roles=(Role.ATTENTION,)))
    with pytest.raises(CheckpointError, match="--common-vocabulary"):
        merge(file, tmp_path / "out")
    merge(file, tmp_path / "out", common_rows=True)
    accounts = accounts_of(tmp_path / "out")
    embedding = accounts["model.embed_tokens.weight"]
    assert (embedding["how"], embedding["sources"], embedding["rules"]) == ("merged", ["base", "a"], [])
    assert {name: account["blake3"] for name, account in accounts.items()} == hashes(tmp_path / "out")
    assert accounts["model.norm.weight"]["how"] == "passed through"
    merge(tmp_path / "out" / "recipe.yaml", tmp_path / "again")  # it says so itself
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")
    (tmp_path / "odd.yaml").write_text(file.read_text() + "vocabulary: some\n")
    with pytest.raises(RecipeError, match="expected 'same' or 'common', got 'some'"):
        merge(tmp_path / "odd.yaml", tmp_path / "odd")


def test_hashes_are_of_the_bytes_in_the_files(moe_parents, tmp_path):
    sources = {name: Checkpoint.open(path) for name, path in moe_parents.items()}
    recipe = Recipe({n: Source(str(p)) for n, p in moe_parents.items()}, "a", "a")
    write_checkpoint(recipe, sources, tmp_path / "out")
    accounts = json.loads((tmp_path / "out" / ACCOUNTING_FILE).read_text())["tensors"]
    assert {name: account["blake3"] for name, account in accounts.items()} == hashes(moe_parents["a"])
