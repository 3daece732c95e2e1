"""Identifying content of scans, reported by kind and count and never by value, and pseudonymous ids.

The toolkit does not de-identify. Headers, paths and free text never enter a store. Pixels do, so burned-in text is
refused unless the user accepts it. Pseudonymous ids are salted hashes; the salt stays on this machine, next to the
stores and never inside one.

Source: DICOM PS3.15 Annex E (Basic Application Level Confidentiality Profile).
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Any

BURNED_IN = "DICOM header marks text burned into the pixels (0028,0301)"
_RISKY_MODALITIES = {"US", "SC", "XC", "ES", "OT"}
_IDENTIFYING = (
    "PatientName",
    "PatientBirthDate",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientBirthName",
    "PatientMotherBirthName",
    "ResponsiblePerson",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "RequestingPhysician",
    "PhysiciansOfRecord",
    "NameOfPhysiciansReadingStudy",
    "InstitutionName",
    "InstitutionAddress",
    "OperatorsName",
    "AccessionNumber",
)
_PATH_SIGNS = {
    "a date in a file or folder name": re.compile(
        r"(?<!\d)(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01])(?!\d)"
    ),
    "a long number (MRN, accession) in a file or folder name": re.compile(r"(?<!\d)\d{6,}(?!\d)"),
    "what looks like a person's name in a file or folder name": re.compile(
        r"(?:^|[/_ ])[A-Z][a-zà-ÿ]{2,}(?:\^|, ?| )[A-Z][a-zà-ÿ]{2,}(?=$|[/_ .])"
    ),
}


def dicom_findings(dataset: Any) -> tuple[str, ...]:
    """Return kinds of identifying content in a DICOM header and its sequences, without values."""
    found = []
    # iterall also visits sequences, where names are as frequent as at the top level.
    elements = list(dataset.iterall())
    filled = {e.keyword for e in elements if e.keyword in _IDENTIFYING and str(e.value or "").strip()}
    if str(dataset.get("PatientIdentityRemoved", "")).upper() != "YES":
        found.append("DICOM header does not confirm that the identity was removed (0012,0062)")
    if names := [name for name in _IDENTIFYING if name in filled]:
        found.append(f"DICOM identifying tags: {', '.join(names)}")
    burned = str(dataset.get("BurnedInAnnotation", "")).upper()
    derived = {str(part).upper() for part in (dataset.get("ImageType") or ())}
    risky = str(dataset.get("Modality", "")) in _RISKY_MODALITIES or bool(derived & {"SECONDARY", "SCREEN SAVE"})
    if burned == "YES":
        found.append(BURNED_IN)
    elif burned != "NO" and risky:
        found.append("DICOM of a kind that often has burned-in text, without a statement that it has none (0028,0301)")
    if any(element.tag.is_private for element in elements):
        found.append("DICOM private tags")
    return tuple(found)


def nifti_findings(header: Any, *, num_extensions: int) -> tuple[str, ...]:
    """Return kinds of free text in a NIfTI header, without values."""
    fields = [name for name in ("descrip", "aux_file", "db_name", "intent_name") if _text(header, name)]
    found = [f"NIfTI free text: {', '.join(fields)}"] if fields else []
    if num_extensions:
        found.append("NIfTI header extensions")
    return tuple(found)


def path_findings(relative: str) -> tuple[str, ...]:
    """Return kinds of identifying patterns in a path below the source folder."""
    return tuple(kind for kind, pattern in _PATH_SIGNS.items() if pattern.search(relative))


def _text(header: Any, name: str) -> bool:
    try:
        return bool(bytes(header[name].tobytes()).strip(b"\x00 "))
    except (KeyError, ValueError):
        return False


SALT_FILE = ".samgraft-salt"


def pseudonym(kind: str, key: str, *, salt: str) -> str:
    """Return ``<kind>_`` and 12 hex digits, e.g. ``p_3f0c...``.

    Twelve digits are 48 bits: among 100,000 patients two collide with a probability of 2e-5.
    """
    return f"{kind}_{hashlib.sha256(f'{salt}/{kind}/{key}'.encode()).hexdigest()[:12]}"


def local_salt(folder: Path) -> str:
    """Return the salt of the stores in a folder, and create it at the first call.

    Stores in one folder share it, so that a patient has one id in all of them and the leak check can compare them.
    """
    path = folder / SALT_FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{SALT_FILE}.{os.getpid()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(temporary, path)  # fails if another process was first, whose salt is then used
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return path.read_text().strip()
