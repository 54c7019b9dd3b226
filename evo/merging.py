"""What becomes of one part: read, measured, merged and rounded once, for a resident model and for an export alike."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from evo.checkpoint import Checkpoint, CheckpointError
from evo.deltas import Deltas
from evo.encodings import Stored, Watcher
from evo.encodings.flaws import find_flaw
from evo.encodings.plain import DTYPES, Plain
from evo.holdings import matrix_of
from evo.job import Job
from evo.measured import Measured
from evo.merge import Method
from evo.merge.apply import PartMerge
from evo.merge.blocks import Operand, Region
from evo.merge.kernels import Fused
from evo.merge.noise import Key, stream_key
from evo.reading import Reader
from evo.vocabulary import CommonRows
from search_spaces.layout import Part

CHUNK_ELEMENTS = 1 << 18
"""Parts are merged in blocks of this size: float32 temporaries take 1 MiB each, and stay in the cache."""
COMPILED_ELEMENTS = 1 << 22
"""The same where a loop needs no temporaries."""


class Merger:
    """Makes parts of merges.

    Args:
        like: a checkpoint of the sources' layout.
        reader: of their parts.
        common: tensors of which the sources have some rows in common.
        deltas: donors as compressed differences, for jobs that may be made of them.
    """

    def __init__(
        self, like: Checkpoint, reader: Reader, common: Mapping[str, CommonRows], deltas: Deltas | None
    ) -> None:
        self._like, self._reader, self._common, self._deltas = like, reader, common, deltas
        self.measured = Measured()
        self.copied: dict[Part, str] = {}
        """Parts of which a look at their numbers made copies -> whose."""
        self.n_compiled = 0
        """Parts, or regions of them, that a compiled loop has made."""

    def part(
        self,
        part: Part,
        job: Job,
        device: torch.device,
        keep: bool,
        watch: Watcher | None = None,
        region: Region | None = None,
    ) -> Stored | Fused:
        """One part, or a region of it, as it is stored, or the loop that makes it.

        Args:
            part: which.
            job: what to make of it.
            device: where.
            keep: whether what is read may stay for the next candidate.
            watch: told what quantising cost.
            region: rows and columns of its matrix; None for all of it.
        """
        read: dict[int, Stored] = {}
        rows = self._common.get(part.tensor)
        looked_at = job.method is not None and not keep and device.type == "cpu"
        late = looked_at and rows is None and region is None and self._may_look_late(part, job)

        def source(i: int) -> Stored:
            if i not in read:
                read[i] = self._reader.read(job.sources[i], part, device, keep, region, check=not late)
            return read[i]

        if rows is None:
            merged = self._merged(part, job, source, device, watch, region)
        else:
            rows = rows.within(region[0]) if region else rows
            interface = as_output(self._reader.read(job.interface, part, device, keep, region), part.tensor)
            if rows.n_rows == 0:
                return interface
            merged = self._merged(part, job, lambda i: rows.cut(source(i)), device, watch, region)
            if isinstance(merged, Fused):
                shape = (rows.n_rows, *interface.shape[1:])
                merged = Stored(interface.encoding, (merged.result().view(shape),))
            merged = rows.complete(merged, interface)
        return self._looked_at(merged, part, job, device, late) if looked_at else merged

    def _may_look_late(self, part: Part, job: Job) -> bool:
        """Whether a loop makes a part, of which nothing is lost if a source has NaN or Inf."""
        mixture = job.method is not None and job.method.is_mixture
        return mixture and isinstance(self._like.entries[part.tensor].encoding, Plain)

    def _looked_at(
        self, merged: Stored | Fused, part: Part, job: Job, device: torch.device, late: bool
    ) -> Stored | Fused:
        """A merge that is not kept, looked through for NaN and Inf: of finite sources, they are what is too large.

        Where it is `late`, nobody has looked for them in the sources. Of mixtures they would be in what a loop makes of
        them, which is less to look through than the sources, and in the cache.
        """

        def look(numbers: Tensor, piece: str = "") -> None:
            for source in job.sources if late else ():
                self._reader.read(source, part, device, keep=False)
            if found := find_flaw(piece, numbers):
                raise CheckpointError(
                    f"{part.tensor}: the merge of finite numbers holds {found}: it leaves the range of its dtype, "
                    "or of float32 on the way. Expected smaller coefficients, sources with smaller numbers, or, in a "
                    "recipe, a dtype with a wider range."
                )

        if isinstance(merged, Fused):
            merged.blame = look
        else:
            for piece, numbers in zip(merged.encoding.suffixes, merged.pieces, strict=True):
                look(numbers, piece)
        return merged

    def _merged(
        self,
        part: Part,
        job: Job,
        source: Callable[[int], Stored],
        device: torch.device,
        watch: Watcher | None,
        region: Region | None,
    ) -> Stored | Fused:
        """What a job makes of its sources, source(0) being the base, or of that region of them."""
        if job.method is None:
            return as_output(source(0), part.tensor)
        with _naming(part, job.method):
            method, (base, *donors) = job.method, self._operands(part, job, source, region)
            operands = dict(zip(job.sources, (base, *donors), strict=True))
            stats = self.measured.of(
                part, job, device, self._whole(part, job, device) if region else operands.__getitem__
            )
            if method.copy_once_measured:
                copied = method.copy_once_measured(job.coefficients, stats=stats, **job.arguments)
                self.copied.pop(part, None)
                if copied is not None:
                    self.copied[part] = job.sources[copied]
                    return as_output(source(copied), part.tensor)
            arguments = dict(job.arguments) if stats is None else {**job.arguments, "stats": stats}
            keys = self._noise_keys(part, job) if method.random else ()
            corner, width = self._place(part, region) if region else ((0, 0), None)
            merge = PartMerge(method, base, donors, job.coefficients, arguments, keys, corner, width)
            output, shape = source(0).encoding.output, source(0).shape
            compiled = merge.compiled(DTYPES[output.dtype] if isinstance(output, Plain) else torch.float32)
            self.n_compiled += compiled is not None
            if compiled and isinstance(output, Plain):
                return compiled
            values, chunk = (compiled.block, COMPILED_ELEMENTS) if compiled else (merge.block, CHUNK_ELEMENTS)
            return Stored(output, output.encode(shape, device, values, chunk, watch))

    def _operands(self, part: Part, job: Job, source: Callable[[int], Stored], region: Region | None) -> list[Operand]:
        """The base, then the donors: themselves, or what is left of them."""
        base = source(0).operand
        if self._deltas is None or not self._is_compressed(part, job):
            return [base, *(source(i).operand for i in range(1, len(job.sources)))]
        donors = (
            self._deltas.donor(name, part, base, lambda i=i: source(i).operand, region)  # type: ignore[misc]
            for i, name in enumerate(job.sources[1:], 1)
        )
        return [base, *donors]

    def _whole(self, part: Part, job: Job, device: torch.device) -> Callable[[str], Operand]:
        """Gives sources of a part as a whole, as they are merged; nothing is kept beyond that."""
        read, deltas = self._reader.whole(part, device), self._deltas
        if deltas is None or not self._is_compressed(part, job):
            return read
        base = job.sources[0]
        return functools.cache(lambda name: read(name) if name == base else deltas.passing(read(base), read(name)))

    def _is_compressed(self, part: Part, job: Job) -> bool:
        covered = self._deltas is not None and self._deltas.covers(matrix_of(self._like, part))
        return job.compressed and covered and part.tensor not in self._common

    def _place(self, part: Part, region: Region) -> tuple[tuple[int, int], int]:
        """Corner of a region, and width of its part."""
        return (region[0].start, region[1].start), matrix_of(self._like, part)[1]

    def _noise_keys(self, part: Part, job: Job) -> list[Key]:
        """A stream of random numbers for each donor."""
        return [stream_key(job.seed, donor, part.tensor, part.row) for donor in job.sources[1:]]


def as_output(stored: Stored, tensor: str) -> Stored:
    """A copy as a merge would be stored; see Stored.as_output.

    Args:
        stored: all of a tensor, or some of it.
        tensor: its name, for an error.

    Raises:
        CheckpointError: if a number of it leaves the range of the dtype that a recipe asks for.
    """
    made = stored.as_output(CHUNK_ELEMENTS)
    if made is not stored and any(map(find_flaw, made.encoding.suffixes, made.pieces)):
        raise CheckpointError(
            f"{tensor}: a number of it leaves the range of {made.encoding}. "
            "Expected a dtype with a wider range, or none."
        )
    return made


@contextlib.contextmanager
def _naming(part: Part, method: Method) -> Iterator[None]:
    """Notes on errors what was merged and how: a method knows no names."""
    try:
        yield
    except Exception as error:
        if part.tensor not in str(error):
            error.add_note(f"({part.tensor}, merge method {method.merge.__name__})")
        raise
