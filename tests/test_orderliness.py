"""Orderliness by hand and against a plain count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitness.orderliness import Orderliness, is_well_formed, repeated_share
from fitness.types import Completion, Finish


def completion(text, ids=()):
    return Completion(text, max(1, len(ids)), 0, Finish.STOP, tuple(ids))


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 6))
def test_repeats_are_what_a_set_of_tuples_says(ids, n):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    assert repeated_share(ids, n) == (1 - len(set(grams)) / len(grams) if grams else 0.0)


def test_corrections_are_words_and_phrases():
    order = Orderliness()
    assert order.n_corrections("Wait, 3 is odd. Hmm. Actually, let me check again.") == 4
    assert order.n_corrections("The waiter await factually; no 3") == 0
    japanese = Orderliness(corrections={"ja": [], "mine": ["oops"]})
    assert japanese.n_corrections("答えは3。待って、違う。oops wait") == 3
    assert Orderliness(corrections={}).n_corrections("wait") == 0
    with pytest.raises(ValueError, match=r"no phrases are known for \['tlh'\]"):
        Orderliness(corrections={"tlh": []})
    assert order.measure(completion("wait wait", range(50)))["corrections_per_100"] == 4.0


def test_well_formed_thoughts():
    for text, good in {
        "<think>a</think>3": True, "a</think>3": True, "3": False, "<think>a": False, "<think>a</think> ": False,
        "<think>a</think>b</think>c": False, "<think>a</think><think>b": False, "": False,
        "<think><think>a</think>3": False,
    }.items():  # fmt: skip
        assert is_well_formed(completion(text)) is good, text
