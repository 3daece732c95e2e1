"""What a DICOM header gives away, by kind and never by value."""

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
    """Put a dataset inside sequences of another."""
    for _ in range(depth):
        dataset = header(RequestAttributesSequence=[dataset])
    return dataset


def test_findings__a_clean_header_has_none():
    assert dicom_findings(nested(header())) == ()


@pytest.mark.parametrize("place", [lambda d: d, nested], ids=["top", "in sequences"])
@pytest.mark.parametrize("name", ["PatientName", "OperatorsName", "InstitutionName", "RequestingPhysician"])
def test_findings__names_wherever_they_stand_and_not_their_values(place, name):
    findings = dicom_findings(place(header(**{name: "Canary^Name"})))
    assert findings == (f"DICOM identifying tags: {name}",)


def test_findings__empty_names_are_none():
    assert dicom_findings(nested(header(PatientName="", AccessionNumber=" "))) == ()


def test_findings__private_tags_in_sequences():
    inner = header()
    inner.private_block(0x0011, "ACME", create=True).add_new(0x01, "LO", "canary")
    assert dicom_findings(nested(inner)) == ("DICOM private tags",)


def test_findings__identity_not_said_to_be_removed():
    assert "0012,0062" in dicom_findings(pydicom.Dataset())[0]
