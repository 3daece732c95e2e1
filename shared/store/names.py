"""The owner's table of names beside a store, which gives each pseudonymous id its file and patient.

It is only for the owner of the scans. It is written next to the store and never inside it, is readable by its owner
alone, and enters no run, shared report or release.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from samgraft.shared.errors import DataError
from samgraft.shared.files import write_private_text
from samgraft.shared.scans.case import SourceCase
from samgraft.shared.scans.readers.registry import scan_stem
from samgraft.shared.store.files import LocalFiles
from samgraft.shared.store.series import SeriesRecord
from samgraft.shared.store.store import SliceStore

NAMES_WORD = ".names."
"""Part of the name of every file with names of scans. The privacy gate of a release refuses such files."""
KIND = "samgraft-names-of-the-owner"
"""Mark inside the file, by which the privacy gate finds a renamed copy."""


@dataclass(frozen=True, kw_only=True)
class OwnerName:
    """Names of one scan at its owner."""

    scan: str
    """Path of the scan below the source folder, or its row in a CSV list."""
    patient: str
    """Patient as read from DICOM, folders, file names or a CSV list."""
    patient_id: str
    """Pseudonymous id of the patient in the store."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names of the scans of a store by their series. Without a table every id is its own name."""

    by_series: Mapping[str, OwnerName] = field(default_factory=dict)

    @cached_property
    def _by_patient(self) -> dict[str, str]:
        """Name of each patient by its id."""
        found: dict[str, str] = {}
        for name in self.by_series.values():
            # The first scan decides, because scans of one patient may name it differently.
            found.setdefault(name.patient_id, name.patient)
        return found

    def __bool__(self) -> bool:
        return bool(self.by_series)

    def scan(self, series_id: str) -> str:
        """Return the name of a scan, or its id."""
        name = self.by_series.get(series_id)
        return name.scan if name else series_id

    def patient(self, patient_id: str) -> str:
        """Return the name of a patient, or the id."""
        return self._by_patient.get(patient_id, patient_id)

    def patients_by_name(self) -> dict[str, set[str]]:
        """Return the ids of the patients that have a name.

        A name is an id, a patient, a path, a file name, or a file name without its ending or its channel (``_0000``).
        """
        found: dict[str, set[str]] = {}
        for series_id, name in self.by_series.items():
            file = Path(name.scan)
            stem = scan_stem(file)
            case = stem[:-5] if stem[-5:-4] == "_" and stem[-4:].isdigit() else stem
            for text in (series_id, name.patient_id, name.patient, name.scan, file.name, stem, case):
                found.setdefault(text, set()).add(name.patient_id)
        return found


def names_path(store_path: Path) -> Path:
    """Return the path of the table of names beside a store."""
    return store_path.with_name(f"{store_path.name.removesuffix('.zarr')}{NAMES_WORD}json")


def write_names(store_path: Path, cases: Iterable[SourceCase], records: Mapping[str, SeriesRecord]) -> None:
    """Write the table of names beside a store, readable by its owner only.

    Args:
        store_path: Folder of the store.
        cases: Cases of the build.
        records: Record of each case that is in the store, by the name of the case.
    """
    series = {
        records[case.name].series_id: {
            "scan": case.name,
            "patient": case.patient_key,
            "patient_id": records[case.name].patient_id,
        }
        for case in cases
        if case.name in records
    }
    content = json.dumps({"kind": KIND, "series": series}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_private_text(names_path(store_path), content)


def read_names(store: SliceStore) -> Names:
    """Read the table of names beside a store. It is empty for a store without one, such as a remote store.

    Raises:
        DataError: If the table is damaged.
    """
    path = names_path(store.path)
    return read_names_file(path) if isinstance(store.files, LocalFiles) and path.is_file() else Names()


def read_names_file(path: Path) -> Names:
    """Read a table of names.

    Raises:
        DataError: If the table is damaged.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["series"]
        return Names(by_series={series_id: OwnerName(**name) for series_id, name in values.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise DataError(
            f"the table of names is damaged ({type(err).__name__}). Run the command that built the store again.",
            where=path.name,
            kept="the store",
        ) from err


def require_names(store: SliceStore) -> Names:
    """Read the table of names, which must exist.

    Raises:
        DataError: If there is none.
    """
    names = read_names(store)
    if not names:
        raise DataError(
            f"the store has no table of names beside it ({names_path(store.path).name}). Run the command that built "
            "the store again: it writes the table and reads no scan twice.",
            where=store.path.name,
        )
    return names
