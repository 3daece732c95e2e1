"""The plugin in a real viewer: its layers are the masks of ``Predictor``, and its files are on the grid of the scan."""

import json
import subprocess
import sys
from pathlib import Path

import napari_session
import nibabel as nib
import numpy as np
import pytest
from finished_factory import make_lab
from samgraft.finetune.prediction.loaded_model import read_one_scan, segment_scan
from samgraft.finetune.prediction.predictor import Predictor
from samgraft.finetune.prompting.prompt_file import read_prompts
from store_factory import make_scan, write_nifti

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.skipif(not napari_session.has_display(), reason="no display, and Xvfb is not installed")
def test_session__layers_are_the_masks_of_the_predictor(tmp_path):
    pytest.importorskip("napari", reason="the plugin needs the extra napari")
    lab = make_lab(tmp_path)
    image, _ = make_scan(shape_zyx=(4, 32, 30), seed=7)
    scan = write_nifti(tmp_path / "scan.nii.gz", image)
    loaded = nib.load(scan)
    as_file = nib.orientations.axcodes2ornt(("S", "R", "A"))
    turned = loaded.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(loaded.affine), as_file))
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), scan)

    program = [sys.executable, napari_session.__file__, str(lab.run), str(scan), str(tmp_path)]
    with napari_session.display() as environment:
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])

    predictor, read = Predictor(lab.run), read_one_scan(scan)
    automatic = segment_scan(predictor, read).labels
    assert automatic.any()
    # The layer's axes are superior, posterior and left. The file's grow to S, R and A.
    as_layer = (0, 2, 1)
    shown = np.load(tmp_path / "automatic.npy")
    assert np.array_equal(shown, automatic.transpose(as_layer))
    prompts = read_prompts(_prompts_file(tmp_path, read.raw.array_ijk.shape), predictor.classes)
    prompted = segment_scan(predictor, read, prompts=prompts).labels
    assert prompted.any()
    assert np.array_equal(np.load(tmp_path / "prompted.npy"), prompted.transpose(as_layer))

    corrected = nib.load(tmp_path / "corrected.nii.gz")
    automatic[0, 0, 0] = 1
    assert np.array_equal(np.asarray(corrected.dataobj), automatic)
    assert np.allclose(corrected.affine, read.raw.affine)
    assert found == {
        "placed": [True, True],
        "classes": ["background", "lesion"],
        "boxes": {"class": ["lesion"]},
        "points": {"class": ["lesion", "lesion"], "inside": ["yes", "no"]},
        "num_layers": 5,
        "num_layers_after_stop": 5,
    }


def _prompts_file(folder: Path, shape_ijk) -> Path:
    """The box and points of the session, in voxels of the file (i = slice, j = column, k = row)."""
    entries = [
        {"class": "lesion", "box": [[2, 6, 5], [2, 20, 24]]},
        {"class": "lesion", "points": [[2, 12, 15], [2, 3, 3]], "labels": [1, 0]},
    ]
    assert shape_ijk == (4, 30, 32)
    path = folder / "prompts.json"
    path.write_text(json.dumps({"version": 1, "coordinates": "voxel", "prompts": entries}))
    return path
