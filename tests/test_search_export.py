"""Members of a front written to disk: scored = exported, and nothing else is touched."""

from contextlib import closing

import pytest

from evo.assemble import build_space, open_sources
from evo.checkpoint import Checkpoint
from evo.export import ExportError
from evo.ledger import Ledger
from evo.types import Origin
from fitness.tasks.arithmetic import Arithmetic
from fitness.types import Split
from tests.conftest import PARENTS
from tests.searching import SIZES, generate_with_transformers


class TestExport:
    def test_the_export_scores_as_the_candidate_did(self, finished, tmp_path):
        row = next(r for r in finished.front().members if r.ask.origin is Origin.SEARCH)
        out = finished.export(str(row.ask.id), tmp_path / "export")
        questions = [p.question for p in Arithmetic(**SIZES, seed=0).problems(Split.HELD_OUT)]
        correct, n_tokens = generate_with_transformers(out, questions)
        with closing(Ledger.open(finished.folder, read_only=True)) as ledger:
            score = ledger.score(row.held_out)
        assert score.correct[:, 0].tolist() == correct.tolist()
        assert score.n_tokens[:, 0].tolist() == n_tokens.tolist()

    def test_files_recipe_and_card(self, finished, tmp_path):
        from search_spaces.recipe import Recipe

        row = finished.front().pick("knee")
        out = finished.export("knee", tmp_path / "export")
        ours, parents = Checkpoint.open(out), PARENTS / "reasoner"
        assert ours.weight_map == Checkpoint.open(parents).weight_map
        for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
            assert (out / name).read_bytes() == (parents / name).read_bytes()
        sources = open_sources(finished.config)
        with closing(Ledger.open(finished.folder, read_only=True)) as ledger:
            recipe = row.ask.recipe_in(lambda: build_space(finished.config, sources, ledger.meta("digests")))
        assert Recipe.from_yaml((out / "recipe.yaml").read_text()) == recipe
        assert (out / "accounting.json").is_file() and (out / "mergekit.yaml").is_file()
        card = (out / "README.md").read_text()
        for part in (
            "reasoner",
            "concise",
            "held_out",
            "tensors: ",
            f"{row.search.summary['accuracy']:.3f}",
        ):
            assert part in card
        assert "\n- mergekit.yaml: the same merge, for mergekit\n" in card

    def test_a_non_empty_folder_is_refused_and_left_alone(self, finished, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
        with pytest.raises(ExportError, match="not empty"):
            finished.export("knee", tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        with pytest.raises(ExportError, match="holds no checkpoint"):
            finished.export("knee", tmp_path / "out", force=True)
        assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
        (tmp_path / "out" / "config.json").write_text("{}")
        finished.export("knee", tmp_path / "out", force=True)
        assert not (tmp_path / "out" / "thesis.txt").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("target", [PARENTS / "reasoner", PARENTS, PARENTS.parent])
    def test_a_parent_is_never_overwritten(self, finished, target):
        with pytest.raises(ExportError, match="is or contains"):
            finished.export("knee", target, force=True)

    def test_nothing_is_left_of_an_export_that_fails(self, finished, tmp_path, monkeypatch):
        from evo.safetensors_writer import SafetensorsWriter

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(SafetensorsWriter, "write", full)
        with pytest.raises(ExportError, match=r"nothing of it is left.*No space left"):
            finished.export("knee", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
