"""Scores per subgroup of patients or scans, by attributes of the store or by a table of the user."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samgraft.finetune.evaluation.scores import Row, class_names, interval_table
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.store.series import SeriesRecord
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
ATTRIBUTES: dict[str, Callable[[SeriesRecord], str]] = {
    "site": lambda record: record.site_id or UNKNOWN,
    "plane": lambda record: record.plane.value,
    "orientation": lambda record: record.grid.orientation,
    "slice_spacing": lambda record: f"{record.spacing_mm[0]:.1f} mm",
}
"""Attributes of a scan in a store. ``site`` is site or scanner, as a salted hash."""


@dataclass(frozen=True, kw_only=True)
class Subgroups:
    """Assignment of every scan to a group."""

    attribute: str
    """Name of the attribute in which the groups differ."""
    group_of: Mapping[str, str]
    """Group of every series id."""

    def table(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return a row per group, class and metric, with intervals over the group's patients."""
        lines = []
        for group, members in self._groups(rows).items():
            for (name, metric), interval in interval_table(members, class_names(rows)).items():
                lines.append(
                    {
                        "attribute": self.attribute,
                        "group": group,
                        "class": name or "all",
                        "metric": metric,
                        "mean": interval.mean if interval else None,
                        "low": interval.low if interval else None,
                        "high": interval.high if interval else None,
                        "num_patients": interval.num_patients if interval else 0,
                    }
                )
        return lines

    def counts(self, rows: Sequence[Row]) -> dict[str, int]:
        """Return the number of scans in every group."""
        return {g: len({row["series_id"] for row in members}) for g, members in self._groups(rows).items()}

    def _groups(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(self.group_of[row["series_id"]], []).append(row)
        return dict(sorted(groups.items()))  # the order of the scans must not change the table


def subgroups_by(attribute: str, store: SliceStore) -> Subgroups:
    """Group scans by an attribute of the store.

    Raises:
        UsageError: If there is no such attribute.
        DataError: If the store has it for no scan.
    """
    if attribute not in ATTRIBUTES:
        raise UsageError(f"groups must be by one of {', '.join(ATTRIBUTES)}, got {attribute!r}.", where="--by")
    group_of = {record.series_id: ATTRIBUTES[attribute](record) for record in store.series}
    # One group of all scans would look like a result.
    if set(group_of.values()) == {UNKNOWN}:
        raise DataError(
            f"the store has the {attribute} of no scan. Build it with --site-pattern, or give --groups.",
            where=store.path.name,
        )
    return Subgroups(attribute=attribute, group_of=group_of)


def read_subgroups(path: Path, store: SliceStore, *, patients: Sequence[str]) -> Subgroups:
    """Read a CSV with the columns patient_id and group.

    Args:
        path: Table; the name of its file becomes the name of the attribute.
        store: Store with the scans to group.
        patients: Patients that must be in the table; others may be.

    Raises:
        DataError: If columns are missing, or a patient is missing or in two groups.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
            reader = csv.DictReader(file)
            if not {"patient_id", "group"} <= set(reader.fieldnames or ()):
                raise DataError(
                    f"a table of groups must have the columns patient_id and group, got "
                    f"{', '.join(reader.fieldnames or ()) or 'none'}.",
                    where=path.name,
                )
            if unused := [str(column) for column in reader.fieldnames or () if column not in ("patient_id", "group")]:
                log.info("columns of %s that are not used: %s", path.name, ", ".join(unused))
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
