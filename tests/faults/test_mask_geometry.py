"""Masks that lie on their scan in every program, whatever the geometry codes of the scan's header."""

import nibabel as nib
import numpy as np
import pytest
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.prediction.prediction_files import NativeMasks, write_nifti, write_seg_nrrd
from samgraft.shared.scans.readers.nifti import nifti_form_codes, read_nifti
from store_factory import make_scan

SimpleITK = pytest.importorskip("SimpleITK", reason="the second reader is a development dependency")
IMAGE, LABEL = make_scan(shape_zyx=(6, 24, 20))


def itk_geometry(path):
    image = SimpleITK.ReadImage(str(path))
    return np.array([*image.GetOrigin(), *image.GetSpacing(), *image.GetDirection()])


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 2), (1, 1), (2, 4)])
def test_write_nifti__mask_has_the_codes_of_its_scan(tmp_path, codes):
    affine = np.array([[0.9, 0, 0, 10], [0, 0.9, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1.0]])
    if codes == (0, 0):
        scan = nib.Nifti1Image(IMAGE.T, None)
        scan.header.set_zooms((0.9, 0.9, 3))
        scan = nib.Nifti1Image(IMAGE.T, None, scan.header)
    else:
        scan = nib.Nifti1Image(IMAGE.T, affine)
        scan.set_qform(affine, code=codes[0])
        scan.set_sform(affine, code=codes[1])
    path = tmp_path / "scan.nii.gz"
    nib.save(scan, path)
    assert nifti_form_codes(path, where="scan") == codes
    masks = NativeMasks(
        labels_ijk=LABEL.T,
        affine=read_nifti(path, where="scan").affine,
        classes=ClassTable(ids=(1,), names=("lesion",)),
        form_codes=codes,
    )
    write_nifti(tmp_path / "mask.nii.gz", masks)
    write_seg_nrrd(tmp_path / "mask.seg.nrrd", masks)
    for name in ("mask.nii.gz", "mask.seg.nrrd"):
        np.testing.assert_allclose(itk_geometry(tmp_path / name), itk_geometry(path), atol=1e-4)
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert (int(mask.header["qform_code"]), int(mask.header["sform_code"])) == codes
    np.testing.assert_allclose(mask.affine, nib.load(path).affine, atol=1e-4)
