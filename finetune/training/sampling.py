"""Balance of training slices with and without foreground."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from samgraft.finetune.classes import ClassTable
from samgraft.shared.samples.slices import SliceRef
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)


def has_foreground(store: SliceStore, ref: SliceRef, classes: ClassTable) -> bool:
    """Return True when a slice shows a class, by the store's table and without reading the slice."""
    record = store.record(ref.series_id)
    pixels = record.planes[ref.plane or record.plane].label_pixels
    wanted = {label for channel in range(classes.num_classes) for label in classes.store_ids(channel)}
    return any(pixels[label][ref.slice_index] > 0 for label in wanted & set(pixels))


def balance_foreground(
    refs: Sequence[SliceRef], is_foreground: Sequence[bool], *, foreground_fraction: float
) -> list[SliceRef]:
    """Repeat foreground slices until they are ``foreground_fraction`` of the list.

    Lesions are small, so most slices show none. The balance is in the list itself, so the order of samples depends only
    on seed and step, and every background slice occurs once per epoch.

    Args:
        refs: All training slices.
        is_foreground: True for each slice that shows a class.
        foreground_fraction: Share in [0, 1); 0 returns the list unchanged, and a larger present share is kept.

    Returns:
        Every slice at least once; foreground slices repeated evenly (their counts differ by at most one).
    """
    foreground = [ref for ref, flag in zip(refs, is_foreground, strict=True) if flag]
    background = len(refs) - len(foreground)
    if not foreground or not 0 < foreground_fraction < 1:
        return list(refs)
    # f = w / (w + b) solved for w, the number of foreground slices after repetition.
    wanted = round(background * foreground_fraction / (1 - foreground_fraction))
    extra = [foreground[i % len(foreground)] for i in range(max(0, wanted - len(foreground)))]
    log.info(
        "training slices: %d, of which %d show a class and are repeated to %d (share %.2f)",
        len(refs),
        len(foreground),
        len(foreground) + len(extra),
        (len(foreground) + len(extra)) / (len(refs) + len(extra)),
    )
    return [*refs, *extra]
