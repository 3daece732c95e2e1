"""Identifying content of DICOM headers, reported by kind and never by value."""

import pydicom
import pytest
from pydicom.dataset import Dataset
from samgraft.shared.scans.privacy import dicom_findings


def header(**values):
    dataset = Dataset()
    for name, value in {"PatientIdentityRemoved": "YES", "Modality": "MR", **values}.items():
        setattr(dataset, name, value)
    return dataset


def nested(dataset, depth=2):
    """Return a dataset inside sequences of others."""
    for _ in range(depth):
        dataset = header(RequestAttributesSequence=[dataset])
    return dataset


def test_dicom_findings__clean_header_has_none():
    assert dicom_findings(nested(header())) == ()


@pytest.mark.parametrize("place", [lambda d: d, nested], ids=["top", "in sequences"])
@pytest.mark.parametrize("name", ["PatientName", "OperatorsName", "InstitutionName", "RequestingPhysician"])
def test_dicom_findings__names_at_any_depth_are_reported_without_values(place, name):
    findings = dicom_findings(place(header(**{name: "Canary^Name"})))
    assert findings == (f"DICOM identifying tags: {name}",)


def test_dicom_findings__empty_names_are_not_reported():
    assert dicom_findings(nested(header(PatientName="", AccessionNumber=" "))) == ()


def test_dicom_findings__private_tags_in_sequences_are_reported():
    inner = header()
    inner.private_block(0x0011, "ACME", create=True).add_new(0x01, "LO", "canary")
    assert dicom_findings(nested(inner)) == ("DICOM private tags",)


def test_dicom_findings__missing_removal_statement_is_reported():
    assert "0012,0062" in dicom_findings(pydicom.Dataset())[0]
