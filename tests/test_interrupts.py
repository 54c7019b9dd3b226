"""An interrupt that a library has swallowed still ends the sitting, and is never a candidate's failure."""

import os
import signal

import numpy as np
import pytest

from evo.interrupts import interruptible, pending
from evo.types import Candidate, Origin
from evo.worker import Worker
from search_spaces.recipe import Recipe, Source


class SwallowingEngine:
    """Its library turns a KeyboardInterrupt into an error of its own, as torch's C++ has been seen to do."""

    def host(self, writer, **arguments):
        pass

    def update(self, recipe):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None


def test_a_swallowed_interrupt_is_no_failed_candidate():
    worker = Worker(SwallowingEngine(), None, {}, max_tokens=1, objectives=("error",), orderliness=None)
    recipe = Recipe({"a": Source("a")}, "a", "a")
    with interruptible(), pytest.raises(KeyboardInterrupt):
        worker.evaluate(Candidate(0, "c0", Origin.SEARCH, 0, recipe, np.zeros(1, np.float32)), "search")
    assert not pending()


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_interrupts_and_is_handled_as_before_afterwards(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("hangups")
def test_what_nohup_keeps_away_stays_away():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interruptible():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not pending()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
