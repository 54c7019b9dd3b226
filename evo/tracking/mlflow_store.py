"""What MLflow is told of a search, and how to tell it again without anything appearing twice.

One run a search, metrics in groups with step = generation, the picture of the front as an image a
generation; a child run for each member of the front and for nothing else, because MLflow's pages stop being
useful at thousands of runs. Every call may be repeated: metrics carry the ledger's times, runs are found by a
tag of our own before one is made, artifacts have fixed names.

mlflow is imported when a store is opened, never before: the process that does it sets its environment first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from evo.config import Config
from evo.front import Row
from evo.picture import front_pixels
from evo.tracking import ARTIFACTS
from evo.tracking.generations import Generation, Record
from evo.tracking.overview import member_page, overview, samples_page
from fitness.types import Split
from search_spaces.recipe import Recipe

IMAGE_KEY = "pareto_front"
RUN_TAG, CANDIDATE_TAG = "mergefront.run", "mergefront.candidate"
_PARENT_TAG, _NOTE_TAG = "mlflow.parentRunId", "mlflow.note.content"
_STATES = {"running": "RUNNING", "finished": "FINISHED", "stopped": "KILLED"}
_MAX_MEANS = 12  # params for the mean coefficients of a recipe
_CHILD_METRICS = ("accuracy", "accuracy_stderr", "tokens_mean", "tokens_mean_stderr", "tokens_p90", "truncated")


class MlflowStore:
    """The run of one search in a tracking store."""

    def __init__(self, folder: Path, uri: str, experiment: str, config: Config, id: str, created: float) -> None:
        """Find the run, or make it.

        Args:
            folder: of the search.
            uri: of the tracking store.
            experiment: its name; made if it is not there.
            config: of the search, as it is now; much of it may change between sittings.
            id: of the search, which never changes.
            created: when it started, in seconds since 1970.
        """
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._folder, self._config, self._created = folder.resolve(), config, created
        self.experiment_id = self._find_experiment(uri, experiment)
        found = next(self._runs(f"tags.`{RUN_TAG}` = '{id}'"), None)
        self.run_id: str = found.info.run_id if found else self._create(folder.name, created, {RUN_TAG: id})
        files = [file.path for file in self._client.list_artifacts(self.run_id, "images")]
        self._images = {_image_place(path) for path in files if "compressed" in path}  # written last
        self._describe(found.data.params if found else {})

    def log_generation(self, generation: Generation) -> None:
        """Metrics and picture of one generation."""
        time = _ms(generation.time)
        self._log(self.run_id, generation.metrics, time, generation.index)
        if (generation.index, time) not in self._images:  # images get names of their own at every call
            pixels = front_pixels(generation.front, title=f"{self._folder.name}, generation {generation.index}")
            self._client.log_image(
                self.run_id, pixels, key=IMAGE_KEY, step=generation.index, timestamp=time, synchronous=True
            )
            self._images.add((generation.index, time))

    def log_members(self, record: Record, recipe_of: Callable[[Row], Recipe]) -> None:
        """Make the child runs those of the front's members: new ones are added, those that fell off deleted.

        A deleted run is only hidden: MLflow can restore it.
        """
        runs = {int(run.data.tags[CANDIDATE_TAG]): run for run in self._runs(f"tags.`{_PARENT_TAG}` = '{self.run_id}'")}
        for candidate in runs.keys() - {row.ask.id for row in record.front.members}:
            self._client.delete_run(runs[candidate].info.run_id)
        for row in record.front.members:
            run = runs.get(row.ask.id)
            if run is None or run.info.status != "FINISHED":
                self._log_member(row, recipe_of(row), None if run is None else run.info.run_id)
            elif row.held_out is not None and "held_out/accuracy" not in run.data.metrics:
                self._log_scores(run.info.run_id, row)

    def log_state(self, record: Record, state: str) -> None:
        """The page that says how the search stands ("running", "finished" or "stopped"), and the run's status."""
        page = overview(record, self._config, self._folder, state)
        self._client.set_tag(self.run_id, _NOTE_TAG, page)
        if state == "running":
            self._client.update_run(self.run_id, status=_STATES[state])
            return
        front = record.front
        self._client.log_text(self.run_id, page, "overview.md")
        self._client.log_text(self.run_id, json.dumps(front.to_dict(Split.SEARCH), indent=2), "front.json")
        if front.members and not any(row.held_out is None for row in front.members):
            self._client.log_text(
                self.run_id, json.dumps(front.to_dict(Split.HELD_OUT), indent=2), "front_held_out.json"
            )
            pixels = front_pixels(front, title=f"{self._folder.name}: search and held-out scores", held_out=True)
            self._client.log_image(self.run_id, pixels, artifact_file="front_held_out.png")
        end = max(self._created, record.last_time)  # a clock may be put back meanwhile
        self._client.set_terminated(self.run_id, _STATES[state], _ms(end))

    def _find_experiment(self, uri: str, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return str(self._client.create_experiment(name, artifact_location=_artifacts_beside(uri)))
        here, there = _artifacts_beside(uri), str(experiment.artifact_location)
        if there != here == (self._folder / ARTIFACTS).as_uri():
            raise RuntimeError(f"this run's folder was moved or copied, and its store would write to {there}")
        return str(experiment.experiment_id)

    def _runs(self, condition: str) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_runs([self.experiment_id], condition, max_results=500, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def _create(self, name: str, time: float, tags: Mapping[str, str]) -> str:
        tags = {**tags, "mlflow.source.name": "mergefront", "mlflow.source.type": "LOCAL"}
        run = self._client.create_run(self.experiment_id, start_time=_ms(time), tags=tags, run_name=name)
        return str(run.info.run_id)

    def _log(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        time: int,
        step: int,
        params: Mapping[str, object] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param

        points = [Metric(key, float(value), time, step) for key, value in metrics.items()]
        settings = [Param(key, str(value)) for key, value in (params or {}).items()]
        self._client.log_batch(run_id, points, settings, synchronous=True)

    def _describe(self, known: Mapping[str, str]) -> None:
        """Params and config; they never change, and MLflow refuses a param that does."""
        params = {key: value for key, value in _run_params(self._config).items() if key not in known}
        self._log(self.run_id, {}, 0, 0, params)
        data = self._config.model_dump(mode="json", exclude={"tracking", "budget"}, exclude_none=True)
        self._client.log_text(self.run_id, yaml.safe_dump(data, sort_keys=False), "config.yaml")
        self._client.set_tag(self.run_id, "mergefront.folder", str(self._folder))

    def _log_member(self, row: Row, recipe: Recipe, run_id: str | None) -> None:
        """All of a member; FINISHED is what says that all of it is there."""
        tags = {_PARENT_TAG: self.run_id, CANDIDATE_TAG: str(row.ask.id)}
        run_id = run_id or self._create(row.ask.name, row.ask.time, tags)
        self._log(run_id, {}, 0, 0, _member_params(row, recipe))
        self._log_scores(run_id, row)
        self._client.log_text(run_id, recipe.to_yaml(), "recipe.yaml")
        self._client.log_text(run_id, samples_page(row), "samples.md")
        self._client.set_terminated(run_id, "FINISHED", _ms(max(row.ask.time, row.search.time)))

    def _log_scores(self, run_id: str, row: Row) -> None:
        self._client.set_tag(run_id, _NOTE_TAG, member_page(row, self._folder))
        for entry, prefix in ((row.search, ""), (row.held_out, "held_out/")):
            if entry is not None and entry.summary:
                metrics = {prefix + key: entry.summary[key] for key in _CHILD_METRICS}
                self._log(run_id, metrics, _ms(entry.time), 0)


def _artifacts_beside(uri: str) -> str | None:
    """Where artifacts of a new experiment go: beside a sqlite file; a server decides for itself."""
    scheme, _, file = uri.partition(":///")
    return (Path(file).resolve().parent / ARTIFACTS).as_uri() if scheme == "sqlite" else None


def _run_params(config: Config) -> dict[str, object]:
    """What tells searches apart, briefly: MLflow writes all of it above every picture. config.yaml has the rest."""
    return {
        "optimizer": config.optimizer.kind,
        "space": config.space.kind,
        "method": config.space.method,
        "task": config.task.kind,
        "parents": ", ".join(config.parents),
        "interface": config.interface_parent,
        "max_tokens": config.engine.max_tokens,
        "seed": config.seed,
    }


def _member_params(row: Row, recipe: Recipe) -> dict[str, object]:
    return {
        "candidate": row.ask.id,
        "origin": row.ask.origin,
        "generation": row.ask.generation,
        "base": recipe.base,
        "interface": recipe.interface,
        "n_rules": len(recipe.rules),
        "recipe": recipe.digest[:16],
        **_mean_coefficients(recipe),
    }


def _mean_coefficients(recipe: Recipe) -> dict[str, str]:
    """Mean over a recipe's rules by role and source: what a parallel-coordinates chart can show."""
    values: dict[str, list[float]] = {}
    for rule in recipe.rules:
        roles = [str(role) for role in rule.roles or ["all"]]
        part = roles[0] if len(roles) == 1 else f"{roles[0]} and {len(roles) - 1} more"
        for source, value in rule.coefficients.items():
            values.setdefault(f"mean/{part}/{source}", []).append(value)
    means = {key: f"{sum(found) / len(found):.4f}" for key, found in values.items()}
    return dict(list(means.items())[:_MAX_MEANS])


def _image_place(path: str) -> tuple[int, int] | None:
    """(step, time) out of the name that MLflow gave a logged image: KEY+step+3+timestamp+1700000000000+..."""
    parts = path.rpartition("/")[2].replace("%", "+").split("+")
    try:
        return int(parts[parts.index("step") + 1]), int(parts[parts.index("timestamp") + 1])
    except (ValueError, IndexError):
        return None


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
