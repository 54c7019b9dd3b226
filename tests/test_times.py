"""Seconds of searches, and what people are told of bytes and times, by hand."""

import pytest

from evo.config import Budget
from evo.planning.times import candidate_seconds, search_seconds, size, span, spans


def test_a_search_ends_at_the_nearest_limit():
    budgets = {"candidates": 100, "tokens": 5000, "hours": 0.01}
    for limits, seconds in ((["candidates"], 200), (["candidates", "tokens"], 100), (list(budgets), 36)):
        assert search_seconds(Budget(**{k: budgets[k] for k in limits}), 2.0, 100.0) == pytest.approx(seconds)


def test_a_candidate_is_merged_and_generated_in_batches_by_hand():
    """Bytes and answers that come out even: a step reads 8 GB and 4 times 1 GB at 6 GB a second, which is 2 s."""
    low, high = candidate_seconds(18 * 10**9, 8 * 10**9, 2 * 10**9, 4, 9, (5.0, 7.0), 6e9)
    assert low == 3 + 3 * 5 * 2  # nine answers by fours are three batches
    assert high == pytest.approx(3 * 3 + 3 * 7 * (10 * 2 + 0.02))


def test_bytes_and_times_for_people():
    sizes = {
        0: "0.0 MB",
        123_456: "0.1 MB",
        999 * 10**6: "999.0 MB",
        10**9: "1.00 GB",
        1_342_052_838_400: "1,342.05 GB",
    }
    assert {n: size(n) for n in sizes} == sizes
    times = {
        0.0123: "0.012 s", 9.0: "9 s", 10: "10 s", 119.4: "119 s", 120: "2.0 min", 7199: "120.0 min", 7200: "2.0 h",
        172_799: "48.0 h", 172_800: "2.0 days", 200_000_000: "2,314.8 days",
    }  # fmt: skip
    assert {t: span(t) for t in times} == times
    assert spans(30, 90) == "30 s to 90 s" and spans(300, 302) == "5.0 min"
