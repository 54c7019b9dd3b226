"""A GPU that is not there: tensors that say they are on one, keep their numbers in the host's memory, and refuse what a
GPU refuses: to be computed with beside tensors of the host. Divided by a number, they are rounded as on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
_BETWEEN_DEVICES = {"copy_", "_to_copy", "index_put_", "index", "_index_put_impl_"}
"""Operations that take tensors of both; indices may be the host's."""


class OnGpu(torch.Tensor):
    """Says it is on the GPU; its numbers are in `host`."""

    @staticmethod
    def __new__(cls, host):
        return torch.Tensor._make_wrapper_subclass(
            cls, host.size(), host.stride(), host.storage_offset(), dtype=host.dtype, device="meta"
        )

    def __init__(self, host):
        self.host = host

    @property
    def device(self):
        return GPU

    @property
    def is_cuda(self):
        return True

    def __repr__(self):
        return f"OnGpu({self.host})"

    def record_stream(self, stream):
        """Whose memory is in no GPU's stream."""

    def __getitem__(self, place):
        if not _has_list(place):
            return super().__getitem__(place)
        with _disable_current_modes():  # torch would make the list a tensor without numbers
            return OnGpu(self.host[place])

    def __setitem__(self, place, value):
        if _has_list(place):
            with _disable_current_modes():
                self.host[place] = value.host
        else:
            super().__setitem__(place, value)

    def tolist(self):
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _has_list(place: Any) -> bool:
    return any(isinstance(one, list) for one in (place if isinstance(place, tuple) else (place,)))


class _Pretending(TorchDispatchMode):
    """What makes a tensor by itself makes it on the GPU, if that is asked for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with self:  # in inference mode, operations that are made of others come whole
            found = function.decompose(*args, **(kwargs or {}))
        return _run(function, args, kwargs or {}) if found is NotImplemented else found


class _Literals(TorchFunctionMode):
    """Lists become tensors of the host first: torch would copy them to the GPU by itself."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        return function(*args, **kwargs)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, device = function._schema.name.split("::")[1], kwargs.get("device")
    if name == "is_pinned":
        return False
    if name in ("_pin_memory", "pin_memory"):
        return args[0].clone()
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, OnGpu)]
    here = [t for t in tensors if not isinstance(t, OnGpu) and t.ndim]
    if there and here and name not in _BETWEEN_DEVICES:
        raise RuntimeError(f"expected all tensors on one device: {name} of {[(t.device, t.shape) for t in tensors]}")
    if there and name in ("div", "div_") and not isinstance(args[1], OnGpu):
        inverse = 1.0 / torch.as_tensor(args[1], dtype=args[0].dtype)  # torch's kernel for CUDA multiplies by it
        function, args = getattr(torch.ops.aten, name.replace("div", "mul")).Tensor, (args[0], inverse)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    unwrapped = tree_map(lambda t: t.host if isinstance(t, OnGpu) else t, (args, kwargs))
    found = function(*unwrapped[0], **unwrapped[1])
    changed = {id(getattr(t, "host", t)): t for t in tensors}
    on_gpu = bool(there) if device is None else torch.device(device).type in ("cuda", "meta")

    def wrapped(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        return changed.get(id(t)) if id(t) in changed else OnGpu(t) if on_gpu else t

    return tree_map(wrapped, found)


@contextlib.contextmanager
def gpu() -> Iterator[torch.device]:
    """Pretend that there is one."""
    lazy_init = torch.cuda._lazy_init
    torch.cuda._lazy_init = lambda: None
    try:
        with _Literals(), _Pretending():
            yield GPU
    finally:
        torch.cuda._lazy_init = lazy_init
