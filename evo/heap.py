"""Memory that has been freed and not given back: glibc's heap grows as temporaries of many sizes come and go between
what is kept.
"""

from __future__ import annotations

import ctypes

_LIBC = ctypes.CDLL(None)


class GivingBack:
    """Gives memory back whenever so much has been looked at.

    Args:
        every: so many bytes.
    """

    def __init__(self, every: int) -> None:
        self._every, self._n_bytes = every, 0

    def looked_at(self, n_bytes: int) -> None:
        """Tell that so many more have been."""
        self._n_bytes += n_bytes
        if self._n_bytes >= self._every:
            give_back_memory()
            self._n_bytes = 0


def give_back_memory() -> None:
    """What has been freed goes back to the system, where the C library is glibc."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)
