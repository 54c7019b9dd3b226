"""Racing: the test by enumeration of every order, by hand and by simulation, and who is stopped by it."""

import itertools

import numpy as np
import pytest

from fitness.proxy.betting import BETS, evidence
from fitness.proxy.order import Order
from fitness.proxy.racing import Race, looks


def plain_order(n_problems, n_chosen=0, seed=0):
    problems = np.random.default_rng(seed).permutation(n_problems)
    return Order(problems, n_chosen, np.ones(n_problems - n_chosen))


def all_orders(n, weights):
    """Every order of a weighted draw without replacement, with its probability."""
    for order in itertools.permutations(range(n)):
        p, left = 1.0, sum(weights)
        for j in order:
            p, left = p * weights[j] / left, left - weights[j]
        yield list(order), p


@pytest.mark.parametrize("paired", [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.5, 2.0], [0.0, 0.0, 2.0, 0.0]])
def test_wealth_is_fair_under_the_null_by_enumeration(paired):
    """E[W] = 1 where the losses add up to the bar exactly: each of 24 orders, weighted by its probability."""
    from fitness.proxy.betting import _wealth

    losses, weights = np.array([0.0, 1.0, 0.3, 2.0]), np.array([1.0, 2.0, 0.5, 3.0])
    bar, h = np.array([losses.sum()]), np.array([paired])
    for n in (1, 2, 3):
        found = [(_wealth(losses[o][:n], weights[o], bar, h[:, o])[0, -1], p) for o, p in all_orders(4, weights)]
        # A bet is skipped only where no room is left, which loses nothing on average.
        assert sum(w * p for w, p in found) == pytest.approx(1.0, abs=1e-9)
        assert min(w for w, _ in found) >= 0.0


def test_a_bar_that_is_reached_is_refuted_with_at_most_alpha():
    rng, alpha, refuted = np.random.default_rng(1), 0.1, 0
    population = rng.random(60) < 0.4
    for _ in range(600):
        order = rng.permutation(60)
        x = population[order].astype(float)
        h = (rng.random(60) < 0.4).astype(float)[None]
        refuted += evidence(x[:40], np.ones(60), np.array([x.sum()]), h)[0] >= 1 / alpha
    assert refuted / 600 <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / 600)


def test_the_test_has_power_and_pairing_adds_to_it():
    rng, found = np.random.default_rng(2), {"paired": 0, "apart": 0, "race": 0}
    for _ in range(100):
        member = (rng.random(300) < 0.4).astype(float)
        worse = np.where(rng.random(300) < 0.15, 1.0, member)
        bar = np.array([member.sum() - 3])
        for name, h in (("paired", member[None]), ("apart", np.zeros((1, 300)))):
            found[name] += evidence(worse[:100], np.ones(300), bar, h)[0] >= 20
        race = Race(plain_order(300), np.array([0.01]), np.zeros((300, 1)), 0.05)  # pairs, in an order of its own
        found["race"] += race.beaten_by(worse[race.order.problems[:100], None], member[None, :, None]) == 0
    assert found["paired"] > 60 and min(found["paired"], found["race"]) > found["apart"] + 20


def test_wealth_of_one_bet_by_hand():
    # First draw of 4 even ones, bar 2: Z = 4 x, so the factor is 1 + lambda (4 x - 2) / 2.
    gained = np.mean([1 + b * (4 * 1.0 - 2) / 2 for b in BETS])
    assert evidence(np.array([1.0]), np.ones(4), np.array([2.0]), np.zeros((1, 4)))[0] == pytest.approx(gained)
    # Paired with h = 1 there: Z = 1 >= -3, a factor of 1 + lambda (1 - 2) / 5, and half of the stake goes on without.
    paired = np.mean([1 + b * (1 - 2) / 5 for b in BETS])
    h = np.array([[1.0, 0.0, 0.0, 0.0]])
    assert evidence(np.array([1.0]), np.ones(4), np.array([2.0]), h)[0] == pytest.approx((paired + gained) / 2)
    # A second loss of 0 is won back at most by half: the largest wealth is that of the first draw.
    assert evidence(np.array([1.0, 0.0]), np.ones(4), np.array([2.0]), np.zeros((1, 4)))[0] == pytest.approx(gained)
    assert evidence(np.array([1.0]), np.ones(4), np.array([0.5]), np.zeros((1, 4)))[0] == np.inf
    assert evidence(np.array([1.0]), np.ones(4), np.array([1.0]), np.zeros((1, 4)))[0] < np.inf  # the rest may be 0
    assert evidence(np.zeros(0), np.ones(4), np.array([2.0]), np.zeros((1, 4)))[0] == 1.0


def race_between(candidate, member, *, tolerance=(0.0, 0.0), floor=None, n_chosen=0, alpha=0.05):
    n = len(member)
    order = plain_order(n, n_chosen)
    race = Race(order, np.array(tolerance), np.zeros((n, 2)) if floor is None else floor, alpha)
    return [race.beaten_by(candidate[order.problems[:k]], member[None]) for k in (16, 64, n - 1)]


def test_a_candidate_that_is_worse_in_both_is_stopped_and_one_that_is_better_in_one_is_not():
    member = np.stack([np.arange(128) % 4 == 0, np.full(128, 30.0)], axis=1).astype(float)
    worse, briefer, abler = member.copy(), member.copy(), member.copy()
    worse[::2, 0], worse[:, 1] = 1.0, 60.0
    briefer[:, 0], briefer[:, 1] = 1.0, 20.0
    abler[:, 0], abler[:, 1] = 0.0, 90.0
    assert race_between(worse, member)[1] == 0
    assert race_between(briefer, member) == [None, None, None]
    assert race_between(abler, member) == [None, None, None]


def test_one_member_must_beat_it_in_both_objectives():
    """A brief bad member and a wordy good one each beat it in one objective, and neither in both."""
    n = 128
    brief = np.stack([np.ones(n), np.full(n, 10.0)], axis=1)
    wordy = np.stack([np.zeros(n), np.full(n, 90.0)], axis=1)
    between = np.stack([np.arange(n) % 2, np.full(n, 50.0)], axis=1).astype(float)
    race = Race(plain_order(n), np.zeros(2), np.zeros((n, 2)), 0.05)
    for k in (16, 64, 127):
        assert race.beaten_by(between[race.order.problems[:k]], np.array([brief, wordy])) is None


def test_who_is_beaten_by_whom_member_by_member():
    """One bet at a time, in words: what is left of a bar over the floor after the chosen problems, which are known."""
    rng, n, n_chosen, found = np.random.default_rng(5), 40, 6, set()
    for alpha in np.geomspace(0.9, 0.01, 100):
        order = Order(rng.permutation(n), n_chosen, rng.uniform(0.5, 2.0, n - n_chosen))
        floor = np.stack([np.zeros(n), rng.uniform(0, 20, n)], axis=1)
        race = Race(order, np.array([0.05, 2.0]), floor, alpha)
        hardness = rng.uniform(0, 1, (n, 2)) ** 3  # which all models share, so that pairing helps
        scatter = rng.uniform(0.3, 1.7, (5, 1, 2)) * rng.uniform(0.8, 1, (5, n, 2))
        candidate, *members = floor + hardness * scatter * [1, 30]
        seen, against = candidate[order.problems[:24]], []
        for member in members:
            weakest = np.inf
            for m in range(2):
                above = [candidate[j, m] - floor[j, m] for j in order.problems[:24]]
                theirs = np.array([member[j, m] - floor[j, m] for j in order.problems])
                bar = sum(theirs) - n * race.tolerance[m] - sum(above[:n_chosen])
                later, rest = np.array(above[n_chosen:]), theirs[None, n_chosen:]
                weakest = min(weakest, evidence(later, order.weights, np.array([bar]), rest)[0])
            against.append(weakest)
        strongest = max(range(4), key=lambda i: against[i])
        expected = strongest if against[strongest] >= 4 / alpha else None  # four members share it
        assert race.beaten_by(seen, np.array(members)) == expected
        found.add(expected)
    assert found == {None, 0, 1, 2, 3}


def test_the_floor_settles_a_tie_and_a_candidate_below_it_is_raced_without():
    member = np.stack([np.zeros(256), np.full(256, 30.0)], axis=1)
    twin, floor = member.copy(), np.stack([np.zeros(256), np.full(256, 30.0)], axis=1)
    assert race_between(twin, member, tolerance=(0.01, 1.0), floor=floor)[0] == 0
    assert race_between(twin, member, tolerance=(0.01, 1.0))[0] is None
    twin[:, 1] = 29.9
    assert race_between(twin, member, tolerance=(0.01, 1.0), floor=floor)[0] is None


def test_random_candidates_that_beat_every_member_are_rarely_stopped():
    rng, stopped, n = np.random.default_rng(3), 0, 100
    for i in range(300):
        member = np.stack([rng.random(n) < 0.3, rng.integers(20, 60, n)], axis=1).astype(float)
        better = member[rng.permutation(n)]
        better[rng.choice(n, 4, replace=False), 1] -= 10  # 0.4 tokens briefer, with the same accuracy
        order = plain_order(n, seed=i)
        race = Race(order, np.zeros(2), np.zeros((n, 2)), 0.1)
        stopped += any(race.beaten_by(better[order.problems[:k]], member[None]) is not None for k in looks(16, n)[:-1])
    assert stopped / 300 <= 0.1


def test_looks_grow_and_end_with_the_split():
    assert looks(16, 100) == [16, 32, 64, 100]
    assert looks(16, 10) == [10]
    assert looks(1, 4) == [1, 2, 4]
