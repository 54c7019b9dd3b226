"""What an export refuses, and that a merge which fails leaves nothing behind."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evo.checkpoint import Checkpoint, CheckpointError
from evo.export import ExportError
from evo.materializer import Materializer
from evo.merge import METHODS, get_method, kernels
from evo.merge_file import merge
from search_spaces.recipe import Rule
from tests.conftest import make_checkpoint
from tests.test_export import hashes, write_recipe


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
