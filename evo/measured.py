"""What methods want to know of whole parts (thresholds, ranks, inner products): measured once, then remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from evo.heap import GivingBack
from evo.job import Job
from evo.merge import Stats
from evo.merge.blocks import Operand
from search_spaces.layout import Part

GIVE_BACK_BYTES = 64 << 20
"""In float32: glibc's heap had grown to 923 MiB beside a model of 509 MiB where 2 MiB were live."""


class Measured:
    """Statistics by what they depend on. They are small: at most a few numbers a row."""

    def __init__(self) -> None:
        self._stats: dict[tuple[Any, ...], Stats] = {}
        self._memory = GivingBack(GIVE_BACK_BYTES)

    def __len__(self) -> int:
        return len(self._stats)

    def forget(self) -> None:
        """Everything."""
        self._stats.clear()

    def of(self, part: Part, job: Job, device: torch.device, operand: Callable[[str], Operand]) -> Any:
        """What a job's method is given as `stats`, or None.

        Args:
            part: of what.
            job: its method says what to measure, on which of its knobs it depends, and whether of each donor.
            device: where; the bits are the same everywhere, but the tensors are there.
            operand: source name -> the whole part of it.
        """
        assert job.method is not None
        measure = job.method.measure
        if measure is None:
            return None
        arguments = {name: job.arguments[name] for name in measure.knobs}

        def stats(names: tuple[str, ...], knobs: Mapping[str, float]) -> Stats:
            key = (measure.function, part, device, job.compressed, job.sources[0], names, measure.key(**knobs))
            if key not in self._stats:
                base = operand(job.sources[0])
                self._stats[key] = measure.function([operand(n) for n in names], base, **knobs)
                self._memory.looked_at(4 * base.numel() * len(names))
            return self._stats[key]

        if not measure.per_donor:
            return stats(job.sources[1:], arguments)
        return [
            stats((name,), {knob: values[d] for knob, values in arguments.items()})
            for d, name in enumerate(job.sources[1:])
        ]
