"""Who is decoded together: invariants of the schedule, and what it saves, against a count of what every row costs."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.planning.footprint import gpu_columns, parked_tokens
from fitness.engines.columns import Columns
from fitness.engines.levels import LEAST_TOKENS, Levels, lowest_level


def run(prompts, answers, rows, lowest=8):
    """Run a schedule of rows with these tokens to write.

    Returns the order in which rows ended, and the tokens that were computed: rows times the longest, summed over steps.
    """
    longest = max(p + a for p, a in zip(prompts, answers, strict=True))
    levels = Levels(prompts, rows, longest, lowest)
    length, batch, ended, parked, computed = list(prompts), [], [], set(), 0
    while levels.anyone or batch:
        joining = levels.join(len(batch))
        assert not (joining.fresh and joining.parked)
        assert set(joining.parked) <= parked
        parked -= set(joining.parked)
        batch += joining.fresh + joining.parked
        assert 0 < len(batch) <= rows
        assert len(set(batch) | parked | set(ended)) == len(batch) + len(parked) + len(ended)
        if joining.parked:
            continue
        stepping = joining.fresh or batch
        computed += len(stepping) * max(length[i] for i in stepping)
        for i in stepping:
            length[i] += 1
        assert sum(length[i] for i in [*batch, *parked]) <= (rows + 1) * longest + len(batch) + len(parked)
        done = {i for i in batch if length[i] >= prompts[i] + answers[i]}
        ended += done
        for i in done:
            levels.end(answers[i])
        left = [i for i in batch if i not in done]
        leaving = {left[place] for place in levels.outgrown([length[i] for i in left])}
        for i in leaving:
            levels.park(i, length[i])
        parked |= leaving
        batch = [i for i in left if i not in leaving]
    return ended, computed


@given(st.data())
def test_every_row_ends_once_and_memory_is_that_of_a_full_batch(data):
    """The assertions are in `run`."""
    n = data.draw(st.integers(1, 40))
    prompts = data.draw(st.lists(st.integers(1, 60), min_size=n, max_size=n))
    answers = data.draw(st.lists(st.integers(1, 120), min_size=n, max_size=n))
    ended, _ = run(prompts, answers, data.draw(st.integers(1, 12)), data.draw(st.integers(1, 300)))
    assert sorted(ended) == list(range(n))


def test_long_rows_cost_the_others_nothing():
    """One in ten is twenty times as long. Each row by itself is the floor; one that pays for the longest is not."""
    n, rows = 320, 16
    answers = [400 if i % 10 == 0 else 20 for i in range(n)]
    floor = sum(a * (a + 1) // 2 for a in answers)
    _, computed = run([1] * n, answers, rows, lowest=32)
    _, with_one_level = run([1] * n, answers, rows, lowest=401)
    assert computed < 1.5 * floor
    assert with_one_level > 2 * floor


def test_rows_that_nobody_waits_for_are_not_parked():
    levels = Levels([3, 3], 2, 100, 8)
    assert levels.join(0).fresh == [0, 1]
    assert levels.outgrown([50, 60]) == []


def test_prompts_of_the_lowest_level_go_first_and_long_prompts_among_their_like():
    levels = Levels([100, 90, 5, 4], 2, 200, 8)
    assert levels.join(0).fresh == [2, 3]
    assert levels.limit == 8
    assert levels.join(2) == ([], [])
    assert levels.join(0).fresh == [0, 1]


@pytest.mark.parametrize(
    ("model", "rows", "token", "tokens"), [(3e9, 64, 28_672, 1634), (4e6, 64, 4096, LEAST_TOKENS), (1e9, 1, 0, 10**9)]
)
def test_the_lowest_level_is_where_keys_and_values_outweigh_the_model(model, rows, token, tokens):
    assert lowest_level(int(model), rows, token) == tokens


def most_tokens(prompts, answers, rows, lowest):
    """Tokens for which there is memory at the worst moment of a run with a real cache, as a GPU has it: all rows and
    columns of the buffer, used or not, and the copies of the rows that are parked.
    """
    longest, number = max(p + a for p, a in zip(prompts, answers, strict=True)), torch.zeros(1, 1, 1, dtype=torch.int8)
    cache, levels = Columns(rows, [(number, number)]), Levels(prompts, rows, longest, lowest)
    length, batch, parked, most = list(prompts), [], {}, 0

    def taken():
        return cache.layers[0].keys.numel() + sum(parked.values())

    while levels.anyone or batch:
        joining = levels.join(len(batch))
        batch += joining.fresh + joining.parked
        if joining.parked:
            cache.join_again([[(number.expand(1, parked[i], 1),) * 2] for i in joining.parked])
            most = max(most, taken())
            for i in joining.parked:
                del parked[i]
            continue
        if joining.fresh:
            cache.join(len(joining.fresh), max(prompts[i] for i in joining.fresh))
        else:
            cache.step(max(length[i] for i in batch) - 1)
        most = max(most, taken())
        for i in joining.fresh or batch:
            length[i] += 1
        ended = [i for i in batch if length[i] == prompts[i] + answers[i]]
        for i in ended:
            levels.end(answers[i])
        left = [batch[place] for place in levels.outgrown([length[i] for i in batch]) if batch[place] not in ended]
        for i in left:
            levels.park(i, length[i])
            parked[i] = length[i] - 1
        most = max(most, taken())
        leaving = [place for place, i in enumerate(batch) if i in {*ended, *left}]
        batch = [batch[place] for place in cache.drop(leaving)] if leaving else batch
    return most


def told_tokens(rows, longest, lowest):
    return rows * gpu_columns(longest) + parked_tokens(rows, longest, lowest)


@given(st.data())
def test_a_plan_is_an_upper_bound_of_what_a_gpu_holds(data):
    n = data.draw(st.integers(1, 40))
    prompts = data.draw(st.lists(st.integers(1, 60), min_size=n, max_size=n))
    answers = data.draw(st.lists(st.integers(1, 200), min_size=n, max_size=n))
    rows, lowest = min(n, data.draw(st.integers(1, 12))), data.draw(st.integers(1, 300))
    longest = max(p + a for p, a in zip(prompts, answers, strict=True))
    assert most_tokens(prompts, answers, rows, lowest) <= told_tokens(rows, longest, lowest)


@pytest.mark.parametrize(
    ("rows", "cap", "lowest", "share"),
    [(16, 1024, 256, 0.5), (16, 1024, 256, 1.0), (32, 1024, 409, 0.5), (32, 1024, 409, 1.0), (8, 2048, 1500, 1.0)],
)
def test_a_plan_is_near_what_a_gpu_holds_where_answers_run_to_the_cap(rows, cap, lowest, share):
    """Of other answers half; of a buffer of 1.5, and parked rows of 1, times what a full batch of the longest has."""
    rng, n = random.Random(0), 6 * rows
    answers = [cap if rng.random() < share else rng.randint(1, cap // 2) for _ in range(n)]
    prompts = [rng.randint(5, 50) for _ in range(n)]
    told, most = told_tokens(rows, 50 + cap, lowest), most_tokens(prompts, answers, rows, lowest)
    assert 0.8 * told < most <= told
    assert most > 1.9 * rows * (50 + cap)


def test_where_nobody_is_parked_a_plan_has_the_buffer_alone():
    prompts, answers, rows = [5] * 30, [200] * 30, 8
    assert parked_tokens(rows, 205, 205) == 0 < parked_tokens(rows, 205, 204)
    assert most_tokens(prompts, answers, rows, 205) <= rows * gpu_columns(205)
