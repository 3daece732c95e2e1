"""Header check of a folder, for identifying content and for scans that a build would refuse.

Headers and names only are read, no pixels; the result holds kinds and counts and never a value. The rules are those of
a build, so ``samgraft doctor`` reports in advance what ``store build`` finds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from samgraft.shared.errors import DataError
from samgraft.shared.scans.privacy import path_findings
from samgraft.shared.scans.readers.registry import inspect_scan
from samgraft.shared.scans.sources import discover


@dataclass(frozen=True, kw_only=True)
class HeaderReport:
    """Findings in the headers and names of a source."""

    layout: str
    num_scans: int
    num_files: int
    kinds: Counter[str]
    """Kind of identifying content -> number of scans that have it."""
    left_out: Counter[str]
    """Reason -> number of files that are no scans."""
    refused: Counter[str] = field(default_factory=Counter)
    """Reason -> number of scans that a build refuses for their headers, without names of files."""
    notes: tuple[str, ...] = ()
    """Decisions about patients and labels, which may name files."""


def check_headers(source: Path) -> HeaderReport:
    """Check the header of every file and every name of a source.

    Args:
        source: Folder in any known layout, or a CSV list.

    Raises:
        DataError: If it holds no scan or contradicts itself.
    """
    found = discover(source)
    kinds: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for case in found.cases:
        names = set(path_findings(case.name))
        try:
            if refusal := case.scan_refusal or case.refusal:
                raise DataError(refusal.split(" (")[0])
            names.update(inspect_scan(case.scan))
            for label in case.labels:
                inspect_scan(label.scan)
        except (DataError, OSError) as err:
            # The first sentence names the fault; what follows may quote values of this one file.
            reason = err.what if isinstance(err, DataError) else "the file cannot be read"
            refused[reason.split(". ")[0].rstrip(".")] += 1
        kinds.update(names)
    return HeaderReport(
        layout=found.layout,
        num_scans=len(found.cases),
        num_files=sum(len(case.scan.paths) for case in found.cases),
        kinds=kinds,
        left_out=found.left_out,
        refused=refused,
        notes=tuple(found.notes),
    )
