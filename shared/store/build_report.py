"""The report of a build or of its dry run: tables for people, the same as JSON for programs."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table
from samgraft.shared.scans.discovery import Discovery
from samgraft.shared.store.build import BuildReport
from samgraft.shared.store.near_duplicates import near_duplicates
from samgraft.shared.store.series import SeriesRecord

MAX_ROWS = 12


def summarise(found: Discovery, report: BuildReport) -> dict[str, Any]:
    """Return everything that the report says, as plain values. Names of refused cases are in it: keep it local."""
    records = report.records
    labelled = [record for record in records if record.has_label]
    contents: dict[str, list[str]] = defaultdict(list)
    for finding in report.findings:
        if finding.record is not None:
            contents[finding.record.content_sha256].append(finding.name)
    name_of = {finding.record.series_id: finding.name for finding in report.findings if finding.record is not None}
    voxels: Counter[int] = Counter()
    slices: Counter[int] = Counter()
    for record in labelled:
        voxels.update(record.label_voxels)
        slices.update({k: sum(n > 0 for n in v) for k, v in record.planes[record.plane].label_pixels.items()})
    names = found.label_names or {}
    return {
        "layout": found.layout,
        "num_cases": len(found.cases),
        "num_series": len(records),
        "num_patients": len({record.patient_id for record in records}),
        "num_slices": sum(record.shape_zyx[0] for record in records),
        "num_labelled": len(labelled),
        "num_empty_labels": sum(not record.label_voxels for record in labelled),
        "labels": {
            str(label): {
                "name": names.get(label, f"label {label}"),
                "voxels": voxels[label],
                "slices": slices[label],
                "series": sum(label in record.label_voxels for record in labelled),
            }
            for label in sorted(set(voxels) | set(names))
        },
        "orientations": dict(Counter(record.grid.orientation for record in records).most_common()),
        "planes": dict(Counter(record.plane.value for record in records).most_common()),
        "dtypes": dict(Counter(record.dtype for record in records).most_common()),
        "spacing_mm": spacing_ranges(records),
        "duplicates": [sorted(same) for same in contents.values() if len(same) > 1],
        "near_duplicates": sorted(
            sorted(name_of[record.series_id] for record in pair) for pair in near_duplicates(records)
        ),
        "refused": dict(sorted(report.refused.items())),
        "notes": dict(Counter(note for record in records for note in record.notes).most_common()),
        "source_notes": found.notes,
        "left_out": dict(found.left_out.most_common()),
        "labels_without_image": found.labels_without_image,
        "images_without_label": found.images_without_label,
        "privacy": dict(Counter(kind for finding in report.findings for kind in finding.privacy).most_common()),
    }


def spacing_ranges(records: list[SeriesRecord]) -> dict[str, list[float]]:
    """Return smallest and largest spacing per axis."""
    if not records:
        return {}
    by_axis = zip(*(record.spacing_mm for record in records), strict=True)
    return {
        axis: [round(min(v), 4), round(max(v), 4)] for axis, v in zip(("slice", "row", "column"), by_axis, strict=True)
    }


def print_report(values: dict[str, Any], console: Console) -> None:
    """Print the report: a table of what came in, then one list per thing to look at."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("layout", str(values["layout"]))
    table.add_row("series", f"{values['num_series']} of {values['num_cases']}, {values['num_patients']} patients")
    table.add_row("slices", f"{values['num_slices']}; series: {_counts(values['planes'])}")
    for axis, (low, high) in values["spacing_mm"].items():
        table.add_row(f"{axis} mm", f"{low:g}" if low == high else f"{low:g} to {high:g}")
    table.add_row("stored as", f"{_counts(values['dtypes'])}; files oriented {_counts(values['orientations'])}")
    console.print(table)
    if values["labels"]:
        labels = Table("label", "name", "voxels", "slices", "series", box=None, pad_edge=False)
        for label, entry in list(values["labels"].items())[:MAX_ROWS]:
            cells = (entry["voxels"], entry["slices"], entry["series"])
            labels.add_row(label, entry["name"], *(f"{v:,}" for v in cells))
        console.print(labels)
        if len(values["labels"]) > MAX_ROWS:
            console.print(f"  ... and {len(values['labels']) - MAX_ROWS} more labels (--report FILE has all)")
    if values["num_empty_labels"]:
        console.print(f"empty labels: {values['num_empty_labels']} of {values['num_labelled']} labelled series")
    _print_list(console, "refused", [f"{name}: {reason}" for name, reason in values["refused"].items()])
    _print_list(console, "same voxels under several names", [" = ".join(names) for names in values["duplicates"]])
    _print_list(
        console,
        "near-duplicates under different patients (one scan exported twice?)",
        [" ~ ".join(names) for names in values["near_duplicates"]],
    )
    _print_list(console, "labels without image", values["labels_without_image"])
    _print_list(console, "images without label", values["images_without_label"])
    for title, key in (("left out", "left_out"), ("notes", "notes")):
        _print_list(console, title, [f"{count} x {what}" for what, count in values[key].items()])
    _print_list(console, "notes on the source", values["source_notes"])
    _print_list(
        console,
        "privacy (headers and names never enter the store; pixels do)",
        [f"{count} x {what}" for what, count in values["privacy"].items()],
    )


def _print_list(console: Console, title: str, lines: list[str]) -> None:
    if not lines:
        return
    console.print(f"{title}:", markup=False, soft_wrap=True)
    for line in lines[:MAX_ROWS]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if len(lines) > MAX_ROWS:
        console.print(f"  ... and {len(lines) - MAX_ROWS} more", markup=False)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items()) or "nothing"
