"""Stopped, killed and extended runs, and those that cannot start or go on."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from evo import Search
from evo.checkpoint import CheckpointError
from evo.config import Budget, ConfigError
from evo.errors import ResumeError
from evo.export import ExportError
from evo.loop import SearchError
from evo.run_folder import BusyError, hold, request_stop
from tests.conftest import PARENTS
from tests.searching import MAX_TOKENS, events, search_entries, write_config


class TestResume:
    @pytest.mark.parametrize("optimizer", ["{kind: cma_es, population: 5}", "{kind: nsga2, population: 5}"])
    def test_stopped_and_extended_equals_uninterrupted(self, optimizer, tmp_path):
        whole = Search.from_yaml(write_config(tmp_path / "a", optimizer=optimizer), tmp_path / "a/run")
        whole.run()
        path = write_config(tmp_path / "b", optimizer=optimizer, candidates=6)
        pieces = Search.from_yaml(path, tmp_path / "b/run")

        def stop_at_9(event):
            if event.history.spent["candidates"] == 9:
                request_stop(pieces.folder)

        pieces.run()
        pieces.run(stop_at_9, Budget(candidates=14))
        assert len(pieces.front().evaluated) == 9
        pieces.run(budget=Budget(candidates=14))
        assert events(pieces.folder)[0] == events(whole.folder)[0]
        assert search_entries(pieces) == search_entries(whole)
        assert [r.ask.id for r in pieces.front().members] == [r.ask.id for r in whole.front().members]

    def test_kill_9_at_random_moments(self, finished, tmp_path):
        """Killed again and again, the finished run is the uninterrupted one but for its times."""
        path, rng = write_config(tmp_path), random.Random(0)
        command = [sys.executable, "-m", "evo.cli", "run", str(path), "--out", str(tmp_path / "run")]
        n_killed, deadline = 0, time.monotonic() + 300
        while time.monotonic() < deadline:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(rng.randint(1, 6)):  # so many evaluations, and then somewhere within the next
                if not process.stdout.readline():
                    break
            time.sleep(rng.uniform(0.0, 0.3))
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            n_killed += 1
            if process.returncode == 0 or n_killed == 4:
                break
        subprocess.run(command, check=True, capture_output=True)
        assert events(tmp_path / "run") == events(finished.folder)

    def test_ctrl_c_keeps_what_was_evaluated(self, tmp_path):
        search = Search.from_yaml(write_config(tmp_path), tmp_path / "run")

        def interrupt(event):
            if event.history.spent["candidates"] == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search.run(interrupt)
        assert len(search.front().evaluated) == 5


class TestRefused:
    def test_another_config(self, finished, tmp_path):
        path = write_config(tmp_path, optimizer="{kind: cma_es, population: 6}")
        with pytest.raises(ResumeError, match=r"optimizer.population: 5 when the run started, 6 now"):
            Search.from_yaml(path, finished.folder).run()

    def test_parents_in_another_order(self, finished, tmp_path):
        """Another tokenizer, and coefficients that count from the other end, though no key has changed."""
        path = write_config(tmp_path)
        first, second = (f"{name}: {PARENTS}/{name}" for name in ("reasoner", "concise"))
        path.write_text(path.read_text().replace(f"{first}, {second}", f"{second}, {first}"))
        with pytest.raises(ResumeError, match=r"the order of parents: \['reasoner', 'concise'\] when the run started"):
            Search.from_yaml(path, finished.folder).run()

    def test_a_parent_that_changed(self, own_parents, tmp_path):
        path = write_config(tmp_path, parents=own_parents, candidates=3)
        search = Search.from_yaml(path, tmp_path / "run")
        search.run()
        shard = next((own_parents / "concise").glob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(data)
        with pytest.raises(ResumeError, match="checkpoint 'concise': its content has changed"):
            search.run(budget=Budget(candidates=5))
        with pytest.raises(ExportError, match="concise: the content"):
            search.export("max-accuracy", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_parents_that_do_not_fit(self, own_parents, tmp_path):
        config = json.loads((own_parents / "concise/config.json").read_text())
        (own_parents / "concise/config.json").write_text(json.dumps({**config, "vocab_size": 7}))
        search = Search.from_yaml(write_config(tmp_path, parents=own_parents), tmp_path / "run")
        with pytest.raises(CheckpointError, match="vocab_size"):
            search.run()
        assert not (tmp_path / "run" / "ledger.sqlite").exists()

    def test_nan_in_a_parent_is_found_before_another_is_scored(self, own_parents, tmp_path):
        shard = next((own_parents / "concise").glob("*.safetensors"))
        tensors = load_file(shard)
        next(iter(tensors.values())).view(-1)[3] = float("nan")
        save_file(tensors, shard, metadata={"format": "pt"})
        search, scored = Search.from_yaml(write_config(tmp_path, parents=own_parents), tmp_path / "run"), []
        with pytest.raises(SearchError, match=r"parent 'concise' cannot be scored: .*holds NaN"):
            search.run(scored.append)
        assert not scored

    def test_a_parent_that_cannot_be_scored(self, tmp_path):
        path = write_config(tmp_path)
        path.write_text(path.read_text().replace(f"max_tokens: {MAX_TOKENS}", "max_tokens: 100000"))
        with pytest.raises(SearchError, match=r"'reasoner' cannot be scored.*lower max_tokens"):
            Search.from_yaml(path, tmp_path / "run").run()

    def test_impossible_options_fail_before_anything_is_written(self, tmp_path):
        path = write_config(tmp_path, optimizer="{kind: cma_es, weights: [1.0, -2.0]}")
        with pytest.raises(ValueError, match="2 positive numbers"):
            Search.from_yaml(path, tmp_path / "run").run()
        assert not (tmp_path / "run" / "ledger.sqlite").exists()

    def test_a_run_that_never_measured_anything_takes_a_mended_config(self, tmp_path):
        path = write_config(tmp_path, candidates=2)
        path.write_text(path.read_text().replace("device: cpu", "device: cuda"))
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="torch sees no GPU here"):
                Search.from_yaml(path, tmp_path / "run").run()
        write_config(tmp_path, candidates=2)
        assert len(Search.from_yaml(path, tmp_path / "run").run().evaluated) == 2

    def test_a_parent_is_no_run_folder(self, own_parents, tmp_path):
        before = sorted(own_parents.rglob("*"))
        with pytest.raises(ConfigError, match="is the checkpoint 'concise': expected a folder of the run's own"):
            Search.from_yaml(write_config(tmp_path, parents=own_parents), own_parents / "concise").run()
        assert sorted(own_parents.rglob("*")) == before

    def test_two_processes_on_one_run(self, finished):
        with hold(finished.folder), pytest.raises(BusyError, match=f"process {os.getpid()} on"):
            finished.run()
