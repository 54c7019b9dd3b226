"""What a worker asks an engine, and what it makes of the answers."""

import pytest

from evo.types import Candidate, Origin, Status
from evo.worker import Worker
from fitness.orderliness import Orderliness
from fitness.tasks.arithmetic import Arithmetic, solve
from fitness.types import Completion, Finish, Split
from search_spaces.recipe import Recipe, Source
from tests.test_proxy_trial import Silent

CANDIDATE = Candidate(3, "c3", Origin.SEARCH, 1, Recipe({"a": Source("a")}, "a", "a"))
N = 12


class Calculator(Silent):
    """Answers with one token for each digit, and is cut off as a model is."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, *, max_tokens, seeds):
        self.asked.append((list(prompts), max_tokens))
        answers = [str(solve(prompt)) for prompt in prompts]
        ends = [Finish.STOP if len(text) <= max_tokens else Finish.LENGTH for text in answers]
        said = [text[:max_tokens] for text in answers]
        return [Completion(text, len(text), 0, end, ()) for text, end in zip(said, ends, strict=True)]


@pytest.mark.parametrize(("limit", "max_tokens"), [(None, None), (5, None), (None, 1), (5, 1)])
def test_a_try_asks_the_first_problems_with_its_own_limit_and_the_next_evaluation_all(limit, max_tokens):
    engine, task = Calculator(), Arithmetic(search=N)
    worker = Worker(engine, task, {}, max_tokens=9, objectives=("error", "tokens"), orderliness=Orderliness())
    questions = [problem.question for problem in task.problems(Split.SEARCH)]
    for n, most in ((limit, max_tokens), (None, None)):
        found = worker.evaluate(CANDIDATE, Split.SEARCH, n, max_tokens=most)
        asked = questions[:n]
        assert engine.asked.pop() == (asked, most or 9)
        fit = [len(str(solve(question))) <= (most or 9) for question in asked]
        assert found.status is Status.DONE and len(found.score.problem_ids) == len(asked)
        assert found.losses[0] == pytest.approx(1 - sum(fit) / len(asked))
    assert 0 < sum(len(str(solve(question))) == 1 for question in questions) < N
