"""One contract for every optimizer of the table, and what each is for."""

import pkgutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from evo.optimizers import OPTIMIZERS, Outcome, SearchProblem, Start
from evo.optimizers.cma_es import CmaEs
from evo.optimizers.nsga2 import Nsga2
from evo.optimizers.random_search import RandomSearch
from evo.pareto import Scale

N = 6
SCALE = Scale(np.zeros(2), np.array([1.0, 2.0]))


def problem(seed=0, n=N):
    ends = (np.zeros(n, np.float32), np.ones(n, np.float32))
    starts = tuple(Start(g, Outcome(losses(g))) for g in (*ends, np.full(n, 0.5, np.float32)))
    return SearchProblem(n, SCALE, seed, starts=starts, corners=ends)


def make(name, seed=0):
    return pkgutil.resolve_name(OPTIMIZERS[name])(problem(seed))


def losses(genome):
    """Two distances that pull apart: to 0.2 everywhere, and to 0.8 everywhere."""
    return np.array([np.mean((genome - 0.2) ** 2), 2 * np.mean((genome - 0.8) ** 2)])


def outcome(index, genome):
    """With failures and infeasible candidates among them."""
    if index % 7 == 3:
        return Outcome(None)
    return Outcome(losses(genome), violation=0.1 if index % 5 == 4 else 0.0)


def drive(optimizer, generations, order=None):
    """Ask and tell for some generations; returns all proposals."""
    asked = []
    for _ in range(generations):
        batch = optimizer.ask(optimizer.batch_size)
        indices = list(range(len(asked), len(asked) + len(batch)))
        asked += batch
        for i in order.permutation(indices) if order is not None else indices:
            optimizer.tell(int(i), outcome(i, asked[i]))
    return np.array(asked)


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestContract:
    def test_genomes_are_float32_in_the_unit_box(self, name):
        genomes = drive(make(name), 5)
        assert genomes.dtype == np.float32 and genomes.shape[1] == N
        assert ((genomes >= 0) & (genomes <= 1)).all()

    def test_same_seed_same_proposals_whatever_the_global_generator_does(self, name):
        first = drive(make(name), 5)
        np.random.seed(1)  # noqa: NPY002  (pycma would draw from it)
        second_optimizer = make(name)
        np.random.random(100)  # noqa: NPY002
        assert np.array_equal(first, drive(second_optimizer, 5))

    def test_order_of_tells_within_a_generation_changes_nothing(self, name):
        assert np.array_equal(drive(make(name), 5), drive(make(name), 5, np.random.default_rng(0)))

    def test_replaying_asks_and_tells_reproduces_what_follows(self, name):
        whole = drive(make(name), 6)
        resumed = make(name)
        n = len(drive(resumed, 3))
        rest = np.array(resumed.ask(resumed.batch_size))
        assert np.array_equal(rest.reshape(-1, N), whole[n : n + len(rest)])

    def test_one_gene_whose_best_value_is_at_an_end(self, name):
        """Step sizes grow on the way there."""
        for seed in range(5):
            optimizer = pkgutil.resolve_name(OPTIMIZERS[name])(problem(seed, 1))
            for generation in range(12):
                batch = optimizer.ask(optimizer.batch_size) or []
                for i, genome in enumerate(batch):
                    optimizer.tell(generation * optimizer.batch_size + i, Outcome(np.array([1.0 - genome[0], 0.0])))
                assert all(genome.shape == (1,) and 0 <= genome[0] <= 1 for genome in batch)

    def test_other_seed_other_proposals(self, name):
        if name == "line_sweep":
            pytest.skip("a sweep has nothing to draw")
        assert not np.array_equal(drive(make(name, 0), 3), drive(make(name, 1), 3))


def best_scalarised(genomes):
    es = CmaEs(problem())
    return min(es.scalarise(Outcome(losses(g))) for g in genomes)


def test_cma_es_finds_the_optimum_that_random_search_misses():
    """Minimum of max(z1, z2) + 0.05 (z1 + z2) with equal weights: 0.5 everywhere, by symmetry."""
    optimizer = CmaEs(problem())
    found = drive(optimizer, 120)
    assert np.allclose(found[-optimizer.batch_size :].mean(axis=0), 0.5, atol=0.02)
    random = drive(RandomSearch(problem(), population=len(found)), 1)
    assert best_scalarised(found) < best_scalarised(random)


def test_scalarisation_is_the_papers():
    """f = max w z + rho sum w z at z = (0.2, 0.5), w = (0.25, 0.75), rho = 0.05."""
    es = CmaEs(problem(), weights=[1, 3])
    value = es.scalarise(Outcome(np.array([0.2, 1.0])))
    assert value == pytest.approx(0.375 + 0.05 * (0.05 + 0.375))


def test_infeasible_sorts_after_feasible_and_failed_after_both():
    es = CmaEs(problem())
    worst_feasible = es.scalarise(Outcome(np.array([1.0, 50.0])))
    little, much = (es.scalarise(Outcome(np.array([0.0, 0.0]), violation=v)) for v in (0.01, 0.5))
    assert worst_feasible < little < much < es.scalarise(Outcome(None))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0]])
def test_weights_that_are_not_two_positive_numbers_are_refused(weights):
    with pytest.raises(ValueError, match="expected 2 positive numbers"):
        CmaEs(problem(), weights=weights)


def test_cma_es_starts_from_the_best_start():
    """Of the ends and the middle the middle is best here; of the ends alone, each is as bad as the other."""
    near = np.mean(CmaEs(problem(), sigma=1e-3).ask(20), axis=0)
    assert np.allclose(near, 0.5, atol=0.01)
    ends = replace(problem(), starts=problem().starts[:1])
    assert np.allclose(np.mean(CmaEs(ends, sigma=1e-3).ask(20), axis=0), 0.0, atol=0.01)
    assert np.allclose(np.mean(CmaEs(ends, sigma=1e-3, start="center").ask(20), axis=0), 0.5, atol=0.01)


def test_cma_es_starts_again_elsewhere_when_it_has_converged():
    """Told the same of everything it stops; then it searches from a random mean with the first step size."""
    optimizer, told, means = CmaEs(problem(), sigma=1e-3), 0, []
    for _ in range(200):
        genomes = optimizer.ask(optimizer.batch_size)
        means.append(np.mean(genomes, axis=0))
        for _ in genomes:
            optimizer.tell(told, Outcome(np.ones(2)))
            told += 1
    jumps = [after for before, after in pairwise(means) if np.abs(after - before).max() > 0.1]
    assert len(jumps) > 1 and np.std(jumps, axis=0).min() > 0.05


def test_cma_es_is_diagonal_for_large_spaces():
    genomes = CmaEs(problem(n=2000), population=8).ask(8)
    assert len(genomes) == 8 and genomes[0].shape == (2000,)


def test_nsga2_covers_more_of_the_front_than_random_search():
    def hypervolume(genomes):
        return SCALE.hypervolume([losses(g) for g in genomes])

    def drive_all_feasible(optimizer, generations):
        asked = []
        for _ in range(generations):
            for genome in optimizer.ask(optimizer.batch_size):
                optimizer.tell(len(asked), Outcome(losses(genome)))
                asked.append(genome)
        return asked

    found = drive_all_feasible(Nsga2(SearchProblem(N, SCALE, 0), population=20), 20)
    random = drive_all_feasible(RandomSearch(problem(), population=20), 20)
    assert hypervolume(found) > hypervolume(random)


@pytest.mark.parametrize("crossover", [0.9, 0.0])
def test_nsga2_proposes_nothing_twice(crossover):
    optimizer = Nsga2(problem(), population=12, crossover=crossover)
    known = {start.genome.tobytes() for start in problem().starts}
    told = 0
    for _ in range(30):
        for genome in optimizer.ask(optimizer.batch_size):
            assert genome.tobytes() not in known
            known.add(genome.tobytes())
            optimizer.tell(told, Outcome(losses(genome)))
            told += 1
    assert told == 30 * 12 - len(problem().starts)


def test_nsga2_breeds_from_the_starts_and_does_not_propose_them_again():
    starts = [start.genome.tolist() for start in problem().starts]
    optimizer = Nsga2(problem(), population=5, crossover=0.0, mutation=0.0)
    first = optimizer.ask(optimizer.batch_size)  # with the starts, a population
    assert len(first) == 2 and not any(genome.tolist() in starts for genome in first)
    for i, genome in enumerate(first):
        optimizer.tell(i, Outcome(losses(genome) + 1.0))  # all starts dominate it
    children = optimizer.ask(optimizer.batch_size)  # copies of parents, as nothing changes them
    assert len(children) == 5
    assert {tuple(genome) for genome in children} <= {tuple(genome) for genome in [*starts, *map(list, first)]}
    assert any(genome.tolist() in starts for genome in children)


def test_nsga2_with_more_starts_than_a_population_goes_on_at_once():
    optimizer = Nsga2(problem(), population=2, crossover=0.0, mutation=0.0)
    starts = [start.genome.tolist() for start in problem().starts]
    assert all(genome.tolist() in starts for genome in optimizer.ask(optimizer.batch_size))


def test_nsga2_breeds_from_feasible_starts_before_better_infeasible_ones():
    good, poor = np.zeros(2), np.ones(2)
    outcomes = [Outcome(good, 0.1), Outcome(poor), Outcome(good, 0.2), Outcome(poor)]
    genomes = [np.full(N, share, np.float32) for share in (0.1, 0.2, 0.3, 0.4)]
    known = replace(problem(), starts=tuple(map(Start, genomes, outcomes)))
    children = Nsga2(known, population=2, crossover=0.0, mutation=0.0).ask(20)
    assert {float(genome[0]) for genome in children} <= {float(genomes[1][0]), float(genomes[3][0])}


def test_order_of_tells_across_generations_changes_nothing():
    def next_after(order):
        optimizer = make("nsga2")
        asked = [genome for _ in range(2) for genome in optimizer.ask(optimizer.batch_size)]
        for i in order(range(len(asked))):
            optimizer.tell(i, outcome(i, asked[i]))
        return np.array(optimizer.ask(optimizer.batch_size))

    assert np.array_equal(next_after(list), next_after(reversed))


def test_nsga2_draws_what_a_failed_start_leaves_open():
    failed = replace(problem(), starts=(*problem().starts, Start(np.full(N, 0.1, np.float32), Outcome(None))))
    assert Nsga2(failed, population=10).batch_size == 10 - 3


def test_nsga2s_children_are_near_their_parents_for_a_large_eta():
    children = np.array(Nsga2(problem(), population=3, crossover=1.0, mutation=0.0, eta=1e4).ask(12))
    assert np.abs(children[..., None] - [0.0, 0.5, 1.0]).min(axis=-1).max() < 0.01


def test_a_sweep_is_evenly_spaced_and_ends():
    optimizer = pkgutil.resolve_name(OPTIMIZERS["line_sweep"])(problem(), points=5)
    assert [float(g[0]) for g in optimizer.ask(100)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert optimizer.ask(100) == []
