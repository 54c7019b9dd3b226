"""The front of rows that are written by hand: who is a member, who is picked and what is told of it."""

from dataclasses import replace

import numpy as np
import pytest

from evo.front import Front, PickError, Row, extended, front_of, rows_of, spread
from evo.ledger import Ask, Entry
from evo.types import Origin, Status
from fitness.types import Split

OBJECTIVES = ("error", "tokens")


def entry(id, error, tokens, split=Split.SEARCH, *, violations=None, compressed=False, status=Status.DONE):
    summary = {"accuracy": 1.0 - error, "accuracy_stderr": 0.05, "tokens_mean": tokens}
    detail = {"delta_errors": {"a": 0.1}} if compressed else {}
    return Entry(id, 0.0, id, split, status, 1.0, (error, tokens), violations or {}, summary, detail)


def row(id, error, tokens, *, origin=Origin.SEARCH, held_out=None, **changes):
    beside = None if held_out is None else entry(id, *held_out, Split.HELD_OUT)
    ask = Ask(id, id, 0.0, 1, f"c{id}", origin, (), None, None)
    return Row(ask, entry(id, error, tokens, **changes), beside)


PARENTS = (row(0, 0.1, 100.0, origin=Origin.PARENT), row(1, 0.5, 20.0, origin=Origin.PARENT))


def ids(rows):
    return [row.ask.id for row in rows]


def front(*rows):
    return front_of([*PARENTS, *rows], OBJECTIVES)


def test_members_are_feasible_exact_and_the_first_of_twins_fewest_tokens_first():
    found = front(
        row(2, 0.3, 50.0), row(3, 0.3, 50.0), row(4, 0.3, 51.0), row(5, 0.0, 10.0, violations={"truncated": 0.1})
    )  # fmt: skip
    assert ids(found.members) == [1, 2, 0] and ids(found.evaluated) == [0, 1, 2, 3, 4, 5]
    assert found.hypervolume == pytest.approx((0.5 * 90 + 0.2 * 60 + 0.2 * 10) / 110)  # strips of the box 1 x 110


def test_scores_with_compressed_donors_make_no_member_and_need_a_proof_where_they_would():
    found = front(row(2, 0.3, 50.0), *(row(i, *losses, compressed=True) for i, losses in enumerate(
        [(0.2, 60.0), (0.3, 50.0), (0.4, 90.0)], start=3
    )))  # fmt: skip
    assert ids(found.members) == [1, 2, 0] and ids(found.unproven) == [3]  # 4 is a twin of one that is proven
    assert ids(front(row(2, 0.3, 50.0, compressed=True), row(3, 0.3, 50.0)).unproven) == []


def test_row_by_row_is_as_all_at_once():
    rng, tokens = np.random.default_rng(0), np.random.default_rng(1).integers(25, 99, 58)
    rows = [
        row(
            i,
            6 / n + rng.integers(0, 5) / 20,
            float(n),
            compressed=bool(rng.random() < 0.4),
            violations={"truncated": 0.1} if rng.random() < 0.2 else {},
        )
        for i, n in enumerate(tokens, start=2)
    ]
    growing, most_unproven = front(), 0
    for i, one in enumerate(rows):
        growing = extended(growing, one, OBJECTIVES)
        whole = front(*rows[: i + 1])
        assert ids(growing.members) == ids(whole.members) and ids(growing.evaluated) == ids(whole.evaluated)
        assert set(ids(growing.unproven)) == set(ids(whole.unproven)) and growing.hypervolume == whole.hypervolume
        most_unproven = max(most_unproven, len(whole.unproven))
    assert most_unproven > 1


def test_only_who_answered_everything_has_a_row():
    whole, partial = entry(0, 0.1, 9.0), entry(1, 0.1, 9.0, status=Status.PARTIAL)
    assert ids(rows_of([whole, partial], [PARENTS[0].ask, PARENTS[1].ask], {})) == [0]


def test_a_limit_of_tokens_is_kept_to_and_one_that_is_too_low_is_told_the_lowest():
    found = front(row(2, 0.3, 50.0))
    assert [found.pick(f"max-tokens={n}").ask.id for n in (20, 50, 99.9, "inf")] == [1, 2, 2, 0]
    with pytest.raises(PickError, match=r"within 19.9 mean tokens: the briefest takes 20\.0$"):
        found.pick("max-tokens=19.9")


def test_the_knee_and_names():
    found = front(row(2, 0.3, 50.0))
    assert [found.pick(which).ask.id for which in ("knee", "max-accuracy", 2, "2", "c2")] == [1, 0, 2, 2, 2]


def test_held_out_scores_are_shown_and_decide_nothing():
    found = front(row(2, 0.3, 50.0, held_out=(0.9, 99.0)), row(3, 0.4, 60.0, held_out=(0.0, 1.0)))
    assert ids(found.members) == [1, 2, 0] and ids(found.unscored()) == [0, 1]
    assert found.hypervolume_on(Split.HELD_OUT) is None  # of the parents there is none
    told = found.to_dict(Split.HELD_OUT)["front"][1]
    assert (told["accuracy"], told["tokens_mean"]) == (pytest.approx(0.1), 99.0)
    assert found.to_dict()["front"][1]["tokens_mean"] == 50.0
    alone: Front = replace(found, members=found.members[1:2])
    assert alone.hypervolume_on(Split.HELD_OUT) == pytest.approx(0.1 * 11 / 110)


def test_a_table_with_little_room_shows_both_ends():
    rows = [row(i, 0.1, 9.0) for i in range(10)]
    assert ids(spread(rows, 4)) == [0, 3, 6, 9] and ids(spread(rows, 10)) == list(range(10))
