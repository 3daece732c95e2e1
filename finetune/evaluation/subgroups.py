"""Scores per subgroup of patients or scans: by site, plane or orientation of the store, or by a table of one's own."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samgraft.finetune.evaluation.scores import METRICS, Row, class_names, interval_of
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.store.series import SeriesRecord
from samgraft.shared.store.store import SliceStore

UNKNOWN = "unknown"
ATTRIBUTES: dict[str, Callable[[SeriesRecord], str]] = {
    "site": lambda record: record.site_id or UNKNOWN,
    "plane": lambda record: record.plane.value,
    "orientation": lambda record: record.grid.orientation,
    "slice_spacing": lambda record: f"{record.spacing_mm[0]:.1f} mm",
}
"""What a store knows of a scan; ``site`` is site or scanner, as a salted hash."""


@dataclass(frozen=True, kw_only=True)
class Subgroups:
    """Which group every scan belongs to."""

    attribute: str
    """What the groups differ in."""
    group_of: Mapping[str, str]
    """Series to group."""

    def table(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return one line per group, class and metric, with intervals over the group's patients."""
        lines = []
        for group, members in self._groups(rows).items():
            for name in (None, *class_names(rows)):
                for metric in METRICS:
                    interval = interval_of(members, metric.key, class_name=name)
                    lines.append(
                        {
                            "attribute": self.attribute,
                            "group": group,
                            "class": name or "all",
                            "metric": metric.key,
                            "mean": interval.mean if interval else None,
                            "low": interval.low if interval else None,
                            "high": interval.high if interval else None,
                            "num_patients": interval.num_patients if interval else 0,
                        }
                    )
        return lines

    def counts(self, rows: Sequence[Row]) -> dict[str, int]:
        """Return the scans of every group."""
        return {g: len({row["series_id"] for row in members}) for g, members in self._groups(rows).items()}

    def _groups(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(self.group_of[row["series_id"]], []).append(row)
        return dict(sorted(groups.items()))


def subgroups_by(attribute: str, store: SliceStore) -> Subgroups:
    """Group scans by what the store knows.

    Raises:
        UsageError: If it does not know that.
        DataError: If it does not know it for any scan.
    """
    if attribute not in ATTRIBUTES:
        raise UsageError(f"groups must be by one of {', '.join(ATTRIBUTES)}, got {attribute!r}.", where="--by")
    group_of = {record.series_id: ATTRIBUTES[attribute](record) for record in store.series}
    if set(group_of.values()) == {UNKNOWN}:
        raise DataError(
            f"the store does not know the {attribute} of any scan. Build it with --site-pattern or give --groups.",
            where=store.path.name,
        )
    return Subgroups(attribute=attribute, group_of=group_of)


def read_subgroups(path: Path, store: SliceStore, *, patients: Sequence[str]) -> Subgroups:
    """Read a CSV with the columns patient_id and group.

    Args:
        path: The table; the name of its file names the groups.
        store: Scans to group.
        patients: Patients that must be in it; others may be.

    Raises:
        DataError: If columns are missing, a patient is listed twice or is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"patient_id", "group"} <= set(reader.fieldnames or ()):
                raise DataError(
                    f"a table of groups must have the columns patient_id and group, got "
                    f"{', '.join(reader.fieldnames or ()) or 'none'}.",
                    where=path.name,
                )
            group_of: dict[str, str] = {}
            for row in reader:
                patient, group = (row["patient_id"] or "").strip(), (row["group"] or "").strip()
                if not group or group_of.get(patient, group) != group:
                    raise DataError(
                        f"line {reader.line_num}: every patient must have one group, got {group!r} for {patient}.",
                        where=path.name,
                    )
                group_of[patient] = group
    except FileNotFoundError as err:
        raise DataError("the table of groups does not exist.", where=path.name) from err
    except (UnicodeDecodeError, csv.Error) as err:
        raise DataError("the table of groups must be CSV in UTF-8.", where=path.name) from err
    if missing := sorted(set(patients) - set(group_of)):
        raise DataError(
            f"every patient of the part must have a group, {len(missing)} have none: {', '.join(missing[:3])}.",
            where=path.name,
        )
    by_series = {r.series_id: group_of[r.patient_id] for r in store.series if r.patient_id in group_of}
    return Subgroups(attribute=path.stem, group_of=by_series)
