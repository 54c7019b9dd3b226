"""What is written: exact accounting, and errors that leave nothing behind."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from blake3 import blake3
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from evo.accounting import ACCOUNTING_FILE
from evo.checkpoint import Checkpoint, CheckpointError
from evo.export import ExportError, write_checkpoint
from evo.in_place import beside
from evo.materializer import Materializer
from evo.merge import METHODS, get_method, kernels
from evo.merge_file import RecipeError, merge
from search_spaces.layout import Role
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import VOCABULARY, make_checkpoint
from tests.encoding import files_of, to_fp8
from tests.packing import pack, store_head
from tests.test_adapter import TARGETS, make_adapter
from tests.test_unscored import MTP, with_mtp
from tests.test_vocabulary import grow


def write_recipe(folder, parents, *rules, base="base"):
    recipe = Recipe({name: Source(str(path)) for name, path in parents.items()}, base, "a", rules)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder / "recipe.yaml"


def hashes(folder: Path) -> dict[str, str]:
    """Tensor -> BLAKE3 of its bytes, by safetensors and blake3 alone."""
    return {
        name: blake3(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in files_of(folder).items()
    }


RULES = (
    Rule("linear", {"a": 0.5}, roles=(Role.ATTENTION,), blocks=(1,)),
    Rule("linear", {"a": 1.0, "b": 0.0}, roles=(Role.ROUTED_EXPERT, Role.FFN)),
    Rule("ties", {"a": 0.6, "b": 0.5}, tensors=("*.input_layernorm.weight",)),
)


def test_what_kill_9_leaves_behind_is_removed_by_the_next(tmp_path):
    """And what a living process writes is not."""
    out = tmp_path / "a [model]"
    code = "import sys, time; from pathlib import Path; from evo.in_place import beside\n"
    code += (
        "with beside(Path(sys.argv[1])) as folder: (folder / 'half').touch(); print(folder, flush=True); time.sleep(99)"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    dead, living = (Path(job.stdout.readline().rstrip()) for job in jobs)
    jobs[0].kill()
    jobs[0].wait()
    (mine := tmp_path / f".{out.name}.mine").mkdir()
    assert dead.is_dir()
    with beside(out) as folder:
        (folder / "whole").touch()
    assert not dead.exists() and (living / "half").is_file() and mine.is_dir()
    assert [file.name for file in out.iterdir()] == ["whole"]
    jobs[1].kill()
    jobs[1].wait()


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


@pytest.mark.parametrize("named", [True, False])
def test_code_that_the_interface_names_is_passed_on(moe_parents, tmp_path, monkeypatch, named):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    parents = {name: shutil.copytree(path, tmp_path / name) for name, path in moe_parents.items()}
    config = json.loads((parents["a"] / "config.json").read_text())
    if named:  # as in DeepSeek's checkpoints
        config["auto_map"] = {"AutoConfig": "configuration_ours.OurConfig"}
    (parents["a"] / "config.json").write_text(json.dumps(config))
    code = "from transformers import LlamaConfig\n\n\nclass OurConfig(LlamaConfig):\n    ours = True\n"
    (parents["a"] / "configuration_ours.py").write_text(code)
    out = tmp_path / "out"
    merge(write_recipe(tmp_path, parents, Rule("linear", {"a": 0.5})), out)
    assert (out / "configuration_ours.py").is_file() == named
    if named:
        assert AutoConfig.from_pretrained(out, trust_remote_code=True).ours


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


class TestWhereParentsAre:
    def test_an_id_of_the_hub_is_its_snapshot_and_is_written_so(self, moe_parents, tmp_path, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        commit = "0123456789abcdef0123456789abcdef01234567"
        shutil.copytree(moe_parents["a"], tmp_path / "hub" / "models--org--a" / "snapshots" / commit)
        sources = {"base": Source(str(moe_parents["base"])), "a": Source("org/a", revision=commit)}
        recipe = Recipe(sources, "base", "a", (Rule("linear", {"a": 1.0}),))
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        merge(tmp_path / "recipe.yaml", tmp_path / "out")
        assert hashes(tmp_path / "out") == hashes(moe_parents["a"])
        assert Recipe.from_yaml((tmp_path / "out" / "recipe.yaml").read_text()) == recipe
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert f"org/a@{commit}" in card.text
        assert card.data.base_model == ["org/a"] and card.data.base_model_relation == "merge"
        (tmp_path / "other.yaml").write_text(recipe.to_yaml().replace("org/a", "org/b"))
        with pytest.raises(RecipeError, match=r"other\.yaml: a: no checkpoint folder at .*HF_HUB_OFFLINE"):
            merge(tmp_path / "other.yaml", tmp_path / "two")

    def test_an_adapter_rests_on_the_base(self, tmp_path):
        base = make_checkpoint(tmp_path / "base", "llama", 0)
        parents = {"base": base, "a": make_adapter(tmp_path / "a", base, 1)}
        recipe = Recipe({n: Source(str(p)) for n, p in parents.items()}, "base", "base", (Rule("linear", {"a": 0.5}),))
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        told = merge(tmp_path / "recipe.yaml", tmp_path / "out")
        found, before = hashes(tmp_path / "out"), hashes(base)
        changed = {name for name in found if found[name] != before[name]}
        assert changed == {name for name in found if name.removesuffix(".weight").endswith(TARGETS)}
        assert any("no mergekit.yaml: mergekit rounds an adapter (a)" in line for line in told.lines)
        write_recipe(tmp_path, parents, Rule("linear", {"a": 0.5}))  # whose interface is the adapter
        with pytest.raises(CheckpointError, match="cannot be the interface"):
            merge(tmp_path / "recipe.yaml", tmp_path / "two")
        assert not (tmp_path / "two").exists()


class TestBadInput:
    def left(self, folder):
        """What a failed merge leaves in its folder, the recipe aside."""
        return sorted(path.name for path in folder.iterdir() if path.name != "recipe.yaml")

    @pytest.mark.parametrize("compiled", [True, False])
    @pytest.mark.parametrize("who", ["base", "a"])
    @pytest.mark.parametrize(
        "rule",
        [
            Rule("linear", {"a": 0.5}),
            Rule("linear", {"a": 1.5}),
            Rule("task_arithmetic", {"a": 0.5}),
            Rule("ties", {"a": 0.5}, knobs={"density": 0.5}),
        ],
        ids=lambda rule: rule.method,
    )
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_no_numbers_in_a_parent(self, moe_parents, tmp_path, monkeypatch, value, rule, who, compiled):
        monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0 if compiled else 1 << 60)
        sick = shutil.copytree(moe_parents[who], tmp_path / "sick")
        shard = sorted(sick.glob("*.safetensors"))[-1]
        tensors = load_file(shard)
        name = next(iter(tensors))
        tensors[name].view(-1)[-1] = value
        save_file(tensors, shard)
        folder = tmp_path / "work"
        folder.mkdir()
        with pytest.raises(CheckpointError, match=f"sick.*tensor {name} holds"):
            merge(write_recipe(folder, {**moe_parents, who: sick}, rule), folder / "out")
        assert self.left(folder) == []

    @pytest.mark.parametrize("method", [name for name in METHODS if get_method(name).is_mixture])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_mixture_holds_no_number_where_a_source_holds_none(self, method, value):
        """Which is why looking at the result is enough, whatever the coefficients."""
        for coefficients in ((0.5, 0.5), (0.0, 1.0), (-0.7, 0.3), (0.0, 0.0)):
            for sick in range(3):
                sources = torch.randn(3, 2, 5)
                sources[sick, 1, 2] = value
                found = get_method(method).merge([sources[1], sources[2]], sources[0].clone(), coefficients)
                assert not found[1, 2].isfinite()

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
    def test_a_merge_that_leaves_the_range_of_its_dtype(self, moe_parents, tmp_path, monkeypatch, method, compiled):
        monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0 if compiled else 1 << 60)
        with pytest.raises(CheckpointError, match="the merge of finite numbers holds"):
            merge(write_recipe(tmp_path, moe_parents, Rule(method, {"a": 3e38, "b": 3e38})), tmp_path / "out")
        assert self.left(tmp_path) == []

    def test_large_numbers_whose_sum_leaves_it_are_merged(self, tmp_path, monkeypatch):
        """Of half precision, in which a sum of many is soon infinite."""
        monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
        parents = {}
        for seed, name in enumerate(("base", "a")):
            parents[name] = make_checkpoint(tmp_path / name, "llama", seed, dtype=torch.float16)
            for shard in parents[name].glob("*.safetensors"):
                save_file({n: t.abs() * 2000 for n, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
        (tmp_path / "work").mkdir()
        merge(write_recipe(tmp_path / "work", parents, Rule("linear", {"a": 0.5})), tmp_path / "out")
        largest = max(float(t.sum()) for t in Checkpoint.open(tmp_path / "out").stored("lm_head.weight").pieces)
        assert largest == float("inf")

    def test_a_target_that_is_a_link(self, moe_parents, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        merge(write_recipe(tmp_path, moe_parents, Rule("linear", {"a": 0.5})), tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and Checkpoint.open(tmp_path / "real").entries

    def test_rules_that_merge_nothing_are_named(self, moe_parents, tmp_path):
        rule = Rule("linear", {"a": 0.5}, tensors=("*.qq_proj.weight",))
        told = merge(write_recipe(tmp_path, moe_parents, rule), tmp_path / "out")
        assert any("rules.0: selects no tensor" in line for line in told.lines)

    def test_a_target_that_is_a_parent(self, moe_parents, tmp_path):
        parents = {name: shutil.copytree(path, tmp_path / "models" / name) for name, path in moe_parents.items()}
        (tmp_path / "models" / "config.json").write_text("{}")  # as in a checkpoint, which might be replaced
        file = write_recipe(tmp_path, parents, Rule("linear", {"a": 0.5}))
        before = hashes(parents["a"])
        for target in (parents["a"], parents["a"].parent):
            with pytest.raises(ExportError, match="is or contains"):
                merge(file, target, force=True)
        assert hashes(parents["a"]) == before

    @pytest.mark.parametrize("target", ["here", "."])
    @pytest.mark.parametrize("whose", ["cwd", "home"])
    def test_where_somebody_works_or_lives_is_never_replaced(self, moe_parents, tmp_path, monkeypatch, target, whose):
        file, out = write_recipe(tmp_path, moe_parents, Rule("linear", {"a": 0.5})), tmp_path / target
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "notes.txt").write_text("years of work")
        monkeypatch.setattr(Path, whose, lambda: tmp_path / "here")
        with pytest.raises(ExportError, match="and would be deleted"):
            merge(file, out, force=True)
        assert (tmp_path / "here" / "notes.txt").is_file()

    def test_a_target_that_links_to_a_parent(self, moe_parents, tmp_path):
        (tmp_path / "link").symlink_to(moe_parents["a"])
        with pytest.raises(ExportError, match="is or contains"):
            merge(write_recipe(tmp_path, moe_parents, Rule("linear", {"a": 0.5})), tmp_path / "link", force=True)

    def test_no_room_is_known_before_any_work(self, moe_parents, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ExportError, match=r"GB of free disk space"):
            merge(write_recipe(tmp_path, moe_parents, Rule("linear", {"a": 0.5})), tmp_path / "out")
        assert self.left(tmp_path) == []

    @pytest.mark.parametrize("limit", [100, 2_000, 15_000])
    def test_a_disk_that_fills_up(self, moe_parents, tmp_path, limit):
        """The operating system refuses to let a file grow: in the weights, or in the files beside them."""
        file = write_recipe(tmp_path, moe_parents, Rule("linear", {"a": 0.5}))

        def small_files():
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails with EFBIG, as with ENOSPC
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        command = [sys.executable, "-c", "from evo.cli import main; main()", "merge", file, "--out", tmp_path / "out"]
        done = subprocess.run(
            command, preexec_fn=small_files, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, timeout=120,
        )  # fmt: skip
        assert done.returncode == 1
        assert "cannot be written, and nothing of it is left" in done.stderr and "File too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert self.left(tmp_path) == []

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("moved", ["old", "new"])
    @pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
    def test_what_was_there_survives_a_failed_replacement(self, moe_parents, tmp_path, monkeypatch, error, moved, when):
        file, out = write_recipe(tmp_path, moe_parents, Rule("linear", {"a": 0.5})), tmp_path / "out"
        merge(file, out)
        before, rename = hashes(out), Path.rename
        merge(write_recipe(tmp_path, moe_parents, Rule("linear", {"a": 0.25})), tmp_path / "other")
        new = hashes(tmp_path / "other")
        shutil.rmtree(tmp_path / "other")

        def fail(self, target):
            concerned = Path(target).name == "was" if moved == "old" else Path(target) == out and self.name != "was"
            if concerned and when == "before":
                raise error
            rename(self, target)
            if concerned:
                raise error

        monkeypatch.setattr(Path, "rename", fail)
        told = (ExportError, "Input/output error") if isinstance(error, OSError) else (KeyboardInterrupt, None)
        with pytest.raises(told[0], match=told[1]):
            merge(file, out, force=True)
        assert hashes(out) == (new if (moved, when) == ("new", "after") else before)
        assert self.left(tmp_path) == ["out"]

    def test_a_parent_that_is_replaced_in_the_middle(self, moe_parents, tmp_path, monkeypatch):
        parents = {name: shutil.copytree(path, tmp_path / name) for name, path in moe_parents.items()}
        stretches, file = Materializer.stretches, max(parents["a"].glob("*.safetensors"))

        def replacing(self, *args):
            for i, found in enumerate(stretches(self, *args)):
                if i == 3:
                    shutil.copyfile(moe_parents["b"] / file.name, file)
                yield found

        monkeypatch.setattr(Materializer, "stretches", replacing)
        (tmp_path / "new").mkdir()
        with pytest.raises(ExportError, match=rf"{file} has been written to, or replaced, while it was"):
            merge(write_recipe(tmp_path, parents, Rule("linear", {"a": 0.5})), tmp_path / "new" / "out")
        assert list((tmp_path / "new").iterdir()) == []

    def test_nothing_is_ever_unpickled(self, moe_parents, tmp_path):
        """The weights of a parent are a pickle that would make a file if it were loaded."""
        sick = shutil.copytree(moe_parents["a"], tmp_path / "sick", ignore=shutil.ignore_patterns("*.safetensors*"))
        trap = tmp_path / "sprung"
        (sick / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
        with pytest.raises(CheckpointError, match=r"a pickle, which is never loaded here\. Convert it first"):
            merge(write_recipe(tmp_path, {**moe_parents, "a": sick}, Rule("linear", {"a": 0.5})), tmp_path / "out")
        assert not trap.exists() and not (tmp_path / "out").exists()


def test_hashes_are_of_the_bytes_in_the_files(moe_parents, tmp_path):
    sources = {name: Checkpoint.open(path) for name, path in moe_parents.items()}
    recipe = Recipe({n: Source(str(p)) for n, p in moe_parents.items()}, "a", "a")
    write_checkpoint(recipe, sources, tmp_path / "out")
    accounts = json.loads((tmp_path / "out" / ACCOUNTING_FILE).read_text())["tensors"]
    assert {name: account["blake3"] for name, account in accounts.items()} == hashes(moe_parents["a"])
