"""Which slices an epoch of fine-tuning shows: lesions are small, so slices with foreground are repeated."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from samgraft.finetune.classes import ClassTable
from samgraft.shared.samples.slices import SliceRef
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)


def has_foreground(store: SliceStore, ref: SliceRef, classes: ClassTable) -> bool:
    """Tell from the store's table whether a slice shows a class, without reading it."""
    record = store.record(ref.series_id)
    pixels = record.planes[ref.plane or record.plane].label_pixels
    wanted = {label for channel in range(classes.num_classes) for label in classes.store_ids(channel)}
    return any(pixels[label][ref.slice_index] > 0 for label in wanted & set(pixels))


def balance_foreground(
    refs: Sequence[SliceRef], is_foreground: Sequence[bool], *, foreground_fraction: float
) -> list[SliceRef]:
    """Repeat foreground slices until they make up ``foreground_fraction`` of the list.

    The list itself carries the balance, so the order of samples stays a pure function of seed and step, and every
    background slice is still shown once per epoch.

    Args:
        refs: All training slices.
        is_foreground: Whether each shows a class.
        foreground_fraction: Wanted share in [0, 1); 0 leaves the list as it is. A share already reached is kept.

    Returns:
        Every slice at least once; foreground slices repeated evenly (their counts differ by at most one).
    """
    foreground = [ref for ref, flag in zip(refs, is_foreground, strict=True) if flag]
    background = len(refs) - len(foreground)
    if not foreground or not 0 < foreground_fraction < 1:
        return list(refs)
    wanted = round(background * foreground_fraction / (1 - foreground_fraction))
    extra = [foreground[i % len(foreground)] for i in range(max(0, wanted - len(foreground)))]
    log.info(
        "training slices: %d, %d of them show a class; those are repeated to %d (share %.2f)",
        len(refs),
        len(foreground),
        len(foreground) + len(extra),
        (len(foreground) + len(extra)) / (len(refs) + len(extra)),
    )
    return [*refs, *extra]
