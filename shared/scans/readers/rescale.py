"""Stored integers to native units, keeping integers where the result is exact."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def rescale(array: Array, *, slope: float, intercept: float) -> Array:
    """Return ``array * slope + intercept``, as int16 or int32 when every value is an exact integer, else float32.

    CT stores Hounsfield units as uint16 with an intercept of -1024: as int16 they need half the space of floats.
    """
    if slope == 1 and intercept == 0:
        return array
    whole = array.dtype.kind in "iu" and float(slope).is_integer() and float(intercept).is_integer()
    if whole and array.size:
        ends = [int(array.min()) * int(slope) + int(intercept), int(array.max()) * int(slope) + int(intercept)]
        for name in ("int16", "int32"):
            info = np.iinfo(name)
            if info.min <= min(ends) and max(ends) <= info.max:
                return (array.astype(np.int64) * int(slope) + int(intercept)).astype(name)
    return (array.astype(np.float64) * slope + intercept).astype(np.float32)


def usable_slope(slope: float | None, intercept: float | None) -> bool:
    """Return whether a header's slope and intercept mean anything: NIfTI says slope 0 means none."""
    return slope is not None and math.isfinite(slope) and slope != 0 and math.isfinite(intercept or 0.0)
