"""Reading that outlasts a short fault of a network drive."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from samgraft.shared.errors import StorageError

Result = TypeVar("Result")

TRANSIENT_ERRORS = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT})
"""What NFS and failing disks answer for a while. A missing or forbidden file is no fault and is said at once."""
NUM_ATTEMPTS = 3
FIRST_WAIT_S = 0.2


def read_patiently(read: Callable[[], Result], *, where: str) -> Result:
    """Return what ``read`` returns, asking again after a transient fault.

    Raises:
        StorageError: If the fault stays.
        OSError: Every other one, unchanged.
    """
    for attempt in range(1, NUM_ATTEMPTS + 1):
        try:
            return read()
        except OSError as err:
            if err.errno not in TRANSIENT_ERRORS:
                raise
            if attempt == NUM_ATTEMPTS:
                raise StorageError(
                    f"the drive does not answer ({err.strerror}) after {NUM_ATTEMPTS} attempts.",
                    where=where,
                    kept="everything that was written before",
                    next_command="look at the drive or its mount, then run the same command again",
                ) from err
            time.sleep(FIRST_WAIT_S * attempt)
    raise AssertionError("unreachable")
