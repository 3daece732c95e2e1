"""Description of a store, as a table for people and as plain values for programs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from samgraft.shared.counting import counted
from samgraft.shared.samples.split import PARTS, load_split_beside
from samgraft.shared.store.build_report import add_spacing_rows, spacing_ranges
from samgraft.shared.store.store import SliceStore


def describe_store(store: SliceStore) -> dict[str, Any]:
    """Return counts, ranges and identity of a store."""
    records = list(store.series)
    split = load_split_beside(store)
    return {
        "name": store.path.name,
        "fingerprint": store.fingerprint,
        "modality": store.modality.value,
        "num_patients": len(store.patient_ids),
        "num_series": len(records),
        "num_slices": sum(record.shape_zyx[0] for record in records),
        "num_labelled": sum(record.has_label for record in records),
        "num_sites": len({record.site_id for record in records if record.site_id}),
        "num_bytes": sum(size for record in records for size, _ in record.files.values()),
        "planes": dict(Counter(p.value for record in records for p in record.planes)),
        "dtypes": dict(Counter(record.dtype for record in records)),
        "sizes_hw": dict(Counter("x".join(str(n) for n in record.shape_zyx[1:]) for record in records).most_common(5)),
        "spacing_mm": spacing_ranges(records),
        "intensity": store.intensity.to_dict(),
        "labels": {
            str(label): {"name": name, "voxels": sum(r.label_voxels.get(label, 0) for r in records)}
            for label, name in sorted(store.label_names.items())
        },
        "ignored_voxels": sum(record.ignored_voxels for record in records),
        "split": None if split is None else {name: len(split.part(name)) for name in PARTS},
    }


def print_description(values: dict[str, Any], console: Console) -> None:
    """Print a description as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("store", f"{values['name']}, {values['modality']}, {values['num_bytes'] / 1e6:.1f} MB")
    table.add_row("fingerprint", values["fingerprint"])
    table.add_row(
        "content",
        f"{counted(values['num_patients'], 'patient')}, {values['num_series']} series ({values['num_labelled']} "
        f"labelled), {counted(values['num_slices'], 'slice')}, "
        f"{counted(values['num_sites'], 'site') if values['num_sites'] else 'no sites'}",
    )
    table.add_row("planes", ", ".join(f"{n} {p}" for p, n in values["planes"].items()))
    table.add_row("slices", ", ".join(f"{n} series of {s} px" for s, n in values["sizes_hw"].items()))
    add_spacing_rows(table, values["spacing_mm"])
    table.add_row("intensity", f"{values['intensity']['name']} ({values['intensity']['kind']})")
    for label, entry in values["labels"].items():
        table.add_row(f"label {label}", f"{entry['name']}, {entry['voxels']:,} voxels")
    if values["ignored_voxels"]:
        table.add_row("not annotated", f"{values['ignored_voxels']:,} voxels, which are never counted")
    split = values["split"]
    table.add_row("split", "none" if split is None else ", ".join(f"{k} {v}" for k, v in split.items()))
    console.print(table, markup=False)
