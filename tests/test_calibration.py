"""Calibration on simulated machines, whose times are known, and on this one."""

from types import SimpleNamespace

import numpy as np
import pytest

from evo.planning.batching import Batch
from evo.planning.calibrate import Asker, CalibrationError, calibrated
from evo.planning.machine import plan_search
from evo.planning.trial import Try, estimate, explore, priced
from evo.types import Evaluation, Status
from fitness.engines.levels import LEAST_TOKENS, Levels

PROMPT = 20
"""Tokens of a prompt of a Machine."""


class Machine:
    """Decodes as the engine does, step by step: a step costs a second for the batch and 0.1 for each row, and
    `attention` for each row and token of the longest; a prompt costs `prompt` more, and a call 3 s. Problem i has an
    answer of lengths[i] tokens.
    """

    def __init__(self, lengths, rows, attention=0.0, prompt=0.0):
        self.lengths, self.rows, self.attention, self.prompt, self.spent = lengths, rows, attention, prompt, 0.0
        self.steps = self.row_steps = self.attended = 0

    def __call__(self, n, cap):
        answers = [min(length, cap) for length in self.lengths[:n]]
        waiting, written, inside, seconds = (
            Levels([PROMPT] * n, self.rows, PROMPT + cap, LEAST_TOKENS),
            [0] * n,
            [],
            3.0,
        )
        while waiting.anyone or inside:
            joining = waiting.join(len(inside))
            inside += joining.fresh + joining.parked
            if joining.parked:
                continue
            for i in (stepping := joining.fresh or inside):
                written[i] += 1
            seconds += self.prompt * len(joining.fresh)
            longest = PROMPT + max(written[i] for i in stepping)
            seconds += 1.0 + (0.1 + self.attention * longest) * len(stepping)
            self.steps, self.row_steps = self.steps + 1, self.row_steps + len(stepping)
            self.attended += longest * len(stepping)
            for i in (ended := [i for i in inside if written[i] == answers[i]]):
                waiting.end(answers[i])
            inside = [i for i in inside if i not in ended]
            for i in (outgrown := [inside[k] for k in waiting.outgrown([PROMPT + written[i] for i in inside])]):
                waiting.park(i, PROMPT + written[i])
            inside = [i for i in inside if i not in outgrown]
        self.spent += seconds
        return Try(n, cap, seconds, tuple(answers))


def explored(machine, n, most, limit):
    """Tries of a Machine, the last one last."""
    return explore(machine, n, Batch(machine.rows, PROMPT), 1, most, limit)


def estimated(tries, n, rows, most, **more):
    """What they say of one with so many rows."""
    batch = Batch(rows, PROMPT)
    return estimate(tries[-1], priced(tries, batch), n, batch, most, **more)


@pytest.mark.parametrize("limit", [1500.0, 5000.0, 30_000.0])
@pytest.mark.parametrize("rows", [8, 32, 256])
def test_a_trial_keeps_to_its_time_and_is_near_the_truth(limit, rows):
    lengths = np.random.default_rng(0).integers(50, 151, 256).tolist()
    truth = Machine(lengths, rows)(256, 200)
    machine = Machine(lengths, rows)
    found = estimated(explored(machine, 256, 200, limit), 256, rows, 200, tokens=sum(truth.lengths) / 256)
    assert machine.spent <= limit
    assert found.seconds == (pytest.approx(truth.seconds, rel=0.25),) * 2
    assert found.tokens == (pytest.approx(sum(truth.lengths), rel=0.1),) * 2


def test_prompts_that_take_long_to_read_are_reckoned_with():
    lengths = np.random.default_rng(0).integers(5, 30, 500).tolist()
    truth, machine = (Machine(lengths, 32, prompt=20.0) for _ in range(2))
    truth = truth(500, 40)
    found = estimated(explored(machine, 500, 40, 0.3 * truth.seconds), 500, 32, 40)
    assert found.seconds == (pytest.approx(truth.seconds, rel=0.1),) * 2


@pytest.mark.parametrize("most", [50, 1000])
@pytest.mark.parametrize("rows", [1, 7, 64, 500])
def test_the_work_of_a_batch_is_that_of_one_simulated_step_by_step(rows, most):
    lengths = np.random.default_rng(1).integers(1, 1.2 * most, 300).tolist()
    machine = Machine(lengths, rows)
    found = Batch(rows, PROMPT).work(machine(300, most).lengths, most)
    assert found.tolist() == [1, 300, machine.steps, machine.row_steps, machine.attended]


@pytest.mark.parametrize("seed", range(3))
def test_times_are_right_where_a_few_answers_run_on(seed):
    """Of which tries of some of the problems see few."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(384) < 0.08, 1200, rng.integers(50, 300, 384)).tolist()
    truth = Machine(lengths, 64, attention=0.002)(384, 1200)
    machine = Machine(lengths, 64, attention=0.002)
    tries = explored(machine, 384, 1200, 0.75 * truth.seconds)
    assert machine.spent <= 0.9 * truth.seconds
    found = estimated(tries, 384, 64, 1200)
    assert found.seconds == (pytest.approx(truth.seconds, rel=0.25),) * 2


def test_a_trial_that_has_time_for_all_extrapolates_nothing():
    lengths = [20, 30, 40, 10] * 8
    truth = Machine(lengths, 4)(32, 64)
    found = estimated(explored(Machine(lengths, 4), 32, 64, 1e6), 32, 4, 64)
    assert found.seconds == (truth.seconds, truth.seconds) and found.tokens == (sum(lengths), sum(lengths))


def test_what_a_batch_costs_once_is_not_charged_for_every_problem():
    machine = Machine([10] * 1000, 10)  # 100 batches of 10 steps, 2 s each
    tries = explored(machine, 1000, 16, 100.0)
    assert tries[-1].n < 20
    assert estimated(tries, 1000, 10, 16, tokens=10).seconds[0] == pytest.approx(3 + 100 * 10 * 2)


def test_answers_that_do_not_end_in_time_are_a_range_unless_their_tokens_are_known():
    machine = Machine([1000] * 64, 64)
    tries = explored(machine, 64, 4096, 1000.0)
    cap = tries[-1].cap
    assert cap < 1000 and machine.spent <= 1000.0
    found = estimated(tries, 64, 64, 4096)
    step = 1 + 0.1 * 64
    assert found.tokens == (64 * cap, 64 * 4096)
    assert found.seconds == (pytest.approx(3 + step * cap), pytest.approx(3 + step * 4096))
    assert estimated(tries, 64, 64, 4096, tokens=10).seconds == (pytest.approx(3 + step * cap),) * 2
    assert estimated(tries, 64, 64, 4096, tokens=5000).seconds == (pytest.approx(3 + step * 4096),) * 2


@pytest.mark.parametrize("share", [0.05, 0.1])
@pytest.mark.parametrize("rows", [16, 64, 256])
@pytest.mark.parametrize("sigma", [0.4, 0.7])
def test_times_are_right_where_hardly_an_answer_ends_in_time_and_some_are_much_longer(sigma, rows, share):
    """Lognormal lengths; when all were reckoned as long, they were up to 48 % off."""
    normal = np.random.default_rng(1).standard_normal(256)
    lengths = np.clip(1000 * np.exp(sigma * normal - sigma**2 / 2), 1, 4000).astype(int).tolist()
    truth = Machine(lengths, rows, attention=0.001)(256, 4000)
    tries = explored(Machine(lengths, rows, attention=0.001), 256, 4000, share * truth.seconds)
    assert tries[-1].cap < 4000 and tries[-1].cut > 0.1
    found = estimated(tries, 256, rows, 4000, tokens=sum(lengths) / 256)
    assert found.seconds == (pytest.approx(truth.seconds, rel=0.25),) * 2
    assert found.tokens == (pytest.approx(sum(lengths), rel=0.1),) * 2


def test_fewer_problems_than_were_tried_and_none_of_them_unfinished():
    """As of held-out problems, where there are few."""
    last = Try(4, 8, 10.0, (3, 5, 8, 8))
    assert estimated([last], 2, 4, 100, tokens=20).tokens == (8.0, 8.0)


def test_a_model_that_cannot_be_tried_is_an_error(chimera):
    failed = SimpleNamespace(evaluate=lambda *_, **__: Evaluation(0, Status.FAILED, 1.0, detail={"reason": "NaN"}))
    with pytest.raises(CalibrationError, match="m cannot be scored: NaN"):
        Asker(failed, chimera, SimpleNamespace(name="m"))(10, 4)


def test_calibration_tries_the_parents_and_a_merge(chimera, tmp_path):
    task = chimera.task.model_copy(update={"search": 8, "held_out": 8, "reserve": 8})
    planned = plan_search(chimera.model_copy(update={"task": task}), out=tmp_path)
    lines = list(calibrated(planned, seconds=1.0))
    assert [line.split(":")[0] for line in lines] == [
        *2 * ["a merge", "reasoner", "concise"], "the search", "the held-out scores",
    ]  # fmt: skip
