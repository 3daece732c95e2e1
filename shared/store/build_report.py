"""Report of a build or of its dry run, as tables for people and as plain values for programs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from samgraft.shared.counting import counted
from samgraft.shared.scans.discovery import Discovery
from samgraft.shared.store.build import BuildReport
from samgraft.shared.store.near_duplicates import near_duplicates
from samgraft.shared.store.series import SeriesRecord

MAX_ROWS = 12
LISTS = {
    "refused": "refused",
    "duplicates": "same voxels under several names",
    "near_duplicates": "near-duplicates under different patients (one scan exported twice?)",
    "labels_without_image": "labels without image",
    "images_without_label": "images without label",
    "left_out": "left out",
    "notes": "notes",
    "source_notes": "notes on the source",
    "privacy": "privacy (headers and names never enter the store; pixels do)",
}
"""Titles of the lists of the report by their key."""


def summarise(found: Discovery, report: BuildReport) -> dict[str, Any]:
    """Return the content of the report as plain values. It names refused cases, so keep it local."""
    records = report.records
    labelled = [record for record in records if record.has_label]
    names_of: dict[str, list[str]] = defaultdict(list)
    for result in report.results:
        if result.record is not None:
            names_of[result.record.content_sha256].append(result.name)
    name_of = {result.record.series_id: result.name for result in report.results if result.record is not None}
    near = [sorted(name_of[record.series_id] for record in pair) for pair in near_duplicates(records)]
    return {
        "layout": found.layout,
        "num_cases": len(found.cases),
        "num_series": len(records),
        "num_patients": len({record.patient_id for record in records}),
        "num_slices": report.num_slices,
        "num_labelled": len(labelled),
        "num_empty_labels": sum(not record.label_voxels for record in labelled),
        "num_ignored_voxels": sum(record.ignored_voxels for record in labelled),
        "num_partly_ignored": sum(record.ignored_voxels > 0 for record in labelled),
        "labels": _count_labels(labelled, found.label_names or {}),
        "orientations": _count(record.grid.orientation for record in records),
        "planes": _count(record.plane.value for record in records),
        "dtypes": _count(record.dtype for record in records),
        "spacing_mm": spacing_ranges(records),
        "duplicates": [sorted(names) for names in names_of.values() if len(names) > 1],
        "near_duplicates": sorted(near),
        "refused": dict(sorted(report.refused.items())),
        "notes": _count(note for record in records for note in record.notes),
        "source_notes": [*found.notes, *_note_on_mask_values(labelled, found.label_names)],
        "left_out": dict(found.left_out.most_common()),
        "labels_without_image": found.labels_without_image,
        "images_without_label": found.images_without_label,
        "privacy": _count(kind for result in report.results for kind in result.privacy),
    }


def _note_on_mask_values(labelled: Sequence[SeriesRecord], label_names: Mapping[int, str] | None) -> list[str]:
    """Return a note if masks of one class each hold different ids, such as 1 in some files and 255 in others."""
    ids = _count(str(next(iter(r.label_voxels))) for r in labelled if len(r.label_voxels) == 1)
    is_mixed = len(ids) > 1 and "255" in ids and all(len(record.label_voxels) < 2 for record in labelled)
    if label_names is not None or not is_mixed:
        return []
    return [
        f"some labels hold only id 255 and others only {', '.join(sorted(set(ids) - {'255'}))}: --label-map joins them"
    ]


def spacing_ranges(records: Sequence[SeriesRecord]) -> dict[str, list[float]]:
    """Return the smallest and largest spacing per axis, in mm."""
    if not records:
        return {}
    by_axis = zip(*(record.spacing_mm for record in records), strict=True)
    return {
        axis: [round(min(v), 4), round(max(v), 4)] for axis, v in zip(("slice", "row", "column"), by_axis, strict=True)
    }


def add_spacing_rows(table: Table, spacing_mm: Mapping[str, Sequence[float]]) -> None:
    """Add one row per axis to a table."""
    for axis, (low, high) in spacing_mm.items():
        table.add_row(f"{axis} mm", f"{low:g}" if low == high else f"{low:g} to {high:g}")


def print_report(values: Mapping[str, Any], console: Console) -> None:
    """Print the report as a table of the scans and one list for every kind of finding."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("layout", str(values["layout"]))
    patients = counted(values["num_patients"], "patient")
    table.add_row("series", f"{values['num_series']} of {values['num_cases']}, {patients}")
    table.add_row("slices", f"{values['num_slices']}; series: {_join_counts(values['planes'])}")
    add_spacing_rows(table, values["spacing_mm"])
    orientations = _join_counts(values["orientations"])
    table.add_row("stored as", f"{_join_counts(values['dtypes'])}; files oriented {orientations}")
    console.print(table)
    if values["labels"]:
        labels = Table("label", "name", "voxels", "slices", "series", box=None, pad_edge=False)
        for label, entry in list(values["labels"].items())[:MAX_ROWS]:
            labels.add_row(label, entry["name"], *(f"{entry[key]:,}" for key in ("voxels", "slices", "series")))
        console.print(labels)
        if len(values["labels"]) > MAX_ROWS:
            console.print(f"  ... and {len(values['labels']) - MAX_ROWS} more labels (--report FILE has all)")
    if values["num_empty_labels"]:
        console.print(f"empty labels: {values['num_empty_labels']} of {values['num_labelled']} labelled series")
    if values["num_ignored_voxels"]:
        console.print(
            f"not annotated (ignored): {values['num_ignored_voxels']:,} voxels in {values['num_partly_ignored']} series"
        )
    for key, title in LISTS.items():
        lines = _list_lines(key, values[key])
        if lines:
            console.print(f"{title}:", markup=False, soft_wrap=True)
        for line in lines[:MAX_ROWS]:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        if len(lines) > MAX_ROWS:
            console.print(f"  ... and {len(lines) - MAX_ROWS} more", markup=False)


def _list_lines(key: str, entries: Any) -> list[str]:
    if key == "refused":
        lines = [f"{name}: {reason}" for name, reason in entries.items()]
    elif isinstance(entries, Mapping):
        lines = [f"{count} x {what}" for what, count in entries.items()]
    elif key in ("duplicates", "near_duplicates"):
        lines = [(" = " if key == "duplicates" else " ~ ").join(names) for names in entries]
    else:
        lines = entries
    # File names may hold control characters, which would reach the terminal.
    return ["".join(c if c.isprintable() else "?" for c in line) for line in lines]


def _count_labels(labelled: Iterable[SeriesRecord], names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    # Labels are counted on the main stack only. Further planes hold the same voxels again.
    voxels: Counter[int] = Counter()
    slices: Counter[int] = Counter()
    series: Counter[int] = Counter()
    for record in labelled:
        voxels.update(record.label_voxels)
        pixels = record.planes[record.plane].label_pixels
        slices.update({label: sum(n > 0 for n in pixels[label]) for label in record.label_voxels})
        series.update(record.label_voxels.keys())
    return {
        str(label): {
            "name": names.get(label, f"label {label}"),
            "voxels": voxels[label],
            "slices": slices[label],
            "series": series[label],
        }
        for label in sorted(set(voxels) | set(names))
    }


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _join_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items()) or "nothing"
