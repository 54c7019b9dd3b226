"""What makes a candidate infeasible, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from evo.config import Constraints
from evo.constraints import violations
from evo.front import Row
from evo.ledger import Ask, Entry
from evo.types import Evaluation, Origin, Status
from fitness.types import Score, Split, Verdict

OBJECTIVES = ("tokens", "error")
LIMITS = Constraints(max_truncated=0.25, accuracy_floor_stderrs=2.0)


def parent(accuracy, stderr):
    ask = Ask(0, 0, 0.0, 0, "p", Origin.PARENT, (), None, None)
    summary = {"accuracy": accuracy, "accuracy_stderr": stderr, "n_problems": 20}
    return Row(ask, Entry(0, 0.0, 0, Split.SEARCH, Status.DONE, 1.0, (1.0, 1.0), {}, summary, {}), None)


PARENTS = [parent(0.9, 0.01), parent(0.6, 0.05)]  # so that a candidate has to reach 0.6 - 2 * 0.05


def evaluation(correct, truncated, status=Status.DONE, losses=(30.0, 0.0), **detail):
    """Of 20 problems, of which so many are right and so many cut off."""
    verdicts = [Verdict.CORRECT] * correct + [Verdict.TRUNCATED] * truncated
    verdicts = np.array([*verdicts, *[Verdict.WRONG] * (20 - len(verdicts))], np.uint8)[:, None]
    tokens = np.ones((20, 1), np.int32)
    score = Score(tuple(map(str, range(20))), verdicts, tokens, tokens)
    return Evaluation(7, status, 1.0, np.array(losses), score=score, detail=detail)


def found(evaluation, origin=Origin.SEARCH):
    return violations(evaluation, origin, OBJECTIVES, LIMITS, PARENTS)


def test_the_floor_is_the_worst_parents():
    assert found(evaluation(10, 0)) == {}  # exactly there
    assert found(evaluation(9, 0)) == {"accuracy": pytest.approx(0.05)}


def test_answers_that_are_cut_off():
    assert found(evaluation(15, 5)) == {}
    assert found(evaluation(14, 6)) == {"truncated": pytest.approx(0.05)}
    assert found(evaluation(8, 7)) == {"truncated": pytest.approx(0.1), "accuracy": pytest.approx(0.1)}


def test_parents_have_no_floor_and_baselines_have():
    assert found(evaluation(0, 6), Origin.PARENT) == {"truncated": pytest.approx(0.05)}
    assert found(evaluation(9, 0), Origin.BASELINE) == {"accuracy": pytest.approx(0.05)}


def test_who_lost_the_race_is_measured_by_its_member_and_who_collapsed_by_nothing():
    assert found(evaluation(0, 20, Status.PARTIAL, stopped_by=3)) == {}
    assert found(evaluation(0, 20, Status.PARTIAL, stopped_by=None)) == {"collapsed": 1.0}


def test_who_is_parked_is_measured_by_its_estimate():
    """Of the error, which is the second of the losses here; what was cut off is counted."""
    parked = {"stopped_by": None, "promise": 0.1}
    assert found(evaluation(0, 0, Status.PARTIAL, losses=(30.0, 0.5), **parked)) == {}
    assert found(evaluation(20, 0, Status.PARTIAL, losses=(30.0, 0.7), **parked)) == {"accuracy": pytest.approx(0.2)}


def test_of_who_is_parked_what_was_cut_off_is_a_share_of_all_problems():
    whole = evaluation(4, 6, Status.PARTIAL, losses=(30.0, 0.2), stopped_by=None, promise=0.1)
    for n, violated in ((10, {"truncated": 0.05}), (9, {})):  # 6 of 20 are too many, and 5 are not
        asked = replace(whole, score=whole.score.take(np.arange(n)))
        assert found(asked) == {name: pytest.approx(amount) for name, amount in violated.items()}


def test_a_failure_has_no_score_to_judge():
    assert violations(Evaluation(7, Status.FAILED, 1.0), Origin.SEARCH, OBJECTIVES, LIMITS, PARENTS) == {}
