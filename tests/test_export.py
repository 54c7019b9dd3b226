"""What is written: a folder whole or not at all, and all that belongs beside the weights."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from blake3 import blake3
from huggingface_hub import ModelCard
from transformers import AutoConfig

from evo.checkpoint import CheckpointError
from evo.in_place import beside
from evo.merge_file import RecipeError, merge
from search_spaces.recipe import Recipe, Rule, Source
from tests.adapters import TARGETS, make_adapter
from tests.conftest import make_checkpoint
from tests.encoding import files_of


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


def test_what_is_replaced_goes_away_though_its_removal_is_killed(tmp_path):
    code = "import os, sys; from pathlib import Path; from evo.in_place import beside\n"
    code += "with beside(Path(sys.argv[1]), replace=True) as folder:\n (folder / 'new').touch()\n"
    code += " sys.addaudithook(lambda event, _: event == 'shutil.rmtree' and os.kill(os.getpid(), 9))"
    (out := tmp_path / "out").mkdir()
    (out / "old").touch()
    assert subprocess.run([sys.executable, "-c", code, out]).returncode == -9
    assert [file.name for file in out.iterdir()] == ["new"]
    with beside(out, replace=True):
        pass
    assert list(tmp_path.iterdir()) == [out]


def test_who_begins_at_the_same_time_takes_no_folder_for_one_that_is_left_behind(tmp_path):
    def write(_):
        with suppress(ZeroDivisionError), beside(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise ZeroDivisionError

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(600)))
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_program_on_the_folder_around_is_not_waited_for(tmp_path):
    """flock on it is anyone's, and who waits for it says nothing."""
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    code = "import sys; from pathlib import Path; from evo.in_place import beside\nwith beside(Path(sys.argv[1])): pass"
    subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=True, timeout=60)
    os.close(holder)
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("named", [True, False])
def test_code_that_the_interface_names_is_passed_on(moe_parents, tmp_path, monkeypatch, named):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    parents = {name: shutil.copytree(path, tmp_path / name) for name, path in moe_parents.items()}
    config = json.loads((parents["a"] / "config.json").read_text())
    if named:  # as in DeepSeek's checkpoints
        config["auto_map"] = {"AutoConfig": "configuration_ours.OurConfig"}
    (parents["a"] / "config.json").write_text(json.dumps(config))
    (parents["a"] / "ours.tiktoken").write_text("YQ== 0")  # a tokenizer of code names its file itself
    code = "from transformers import LlamaConfig\n\n\nclass OurConfig(LlamaConfig):\n    ours = True\n"
    (parents["a"] / "configuration_ours.py").write_text(code)
    out = tmp_path / "out"
    merge(write_recipe(tmp_path, parents, Rule("linear", {"a": 0.5})), out)
    assert (out / "configuration_ours.py").is_file() == named
    assert (out / "ours.tiktoken").read_text() == "YQ== 0"
    if named:
        assert AutoConfig.from_pretrained(out, trust_remote_code=True).ours


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
        assert any("mergekit.yaml: mergekit rounds adapters (a) into their models" in line for line in told.lines)
        write_recipe(tmp_path, parents, Rule("linear", {"a": 0.5}))  # whose interface is the adapter
        with pytest.raises(CheckpointError, match="cannot be the interface"):
            merge(tmp_path / "recipe.yaml", tmp_path / "two")
        assert not (tmp_path / "two").exists()
