"""NaN and Inf in what files hold: they would spread through a merge, and out of a norm or a threshold into whole
tensors.

Looks at numbers as they are stored. Does not know whether a product of finite ones (FP8 with its scale, the factors
of a LoRA) leaves the range of float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evo.encodings.fp8_blocks import holds_nan
from evo.encodings.mxfp4 import NAN_SCALE, SCALES
from evo.encodings.plain import DTYPES


def find_flaw(piece: str, numbers: Tensor) -> str | None:
    """What a tensor of the files holds that is no finite number, "NaN" or "Inf"; else None."""
    if not numbers.numel():
        return None
    if numbers.dtype == torch.float8_e4m3fn:
        return "NaN" if holds_nan(numbers) else None
    if numbers.dtype == torch.uint8 and piece.endswith(SCALES):
        return "NaN" if int(numbers.max()) == NAN_SCALE else None
    if numbers.dtype not in DTYPES.values():
        return None
    if math.isfinite(float(numbers.sum())):  # neither can leave a sum again; twice as fast as looking for extremes
        return None
    low, high = (float(end) for end in numbers.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return None
    return "NaN" if math.isnan(low) else "Inf"
