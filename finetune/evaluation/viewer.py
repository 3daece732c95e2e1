"""Viewer for scans in a report, with three planes and a 3D view.

The viewer is niivue, pinned by version and sha256 and embedded in the page. It is not part of the repository:
``make install`` and ``make wheel`` run ``python -m samgraft.finetune.evaluation.viewer``, which takes it from nilearn's
wheel and writes it next to this file. Reports without it contain a note instead.

Shape letters: Z = slices, H, W = rows and columns of a slice.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.shared.errors import SamgraftError, StorageError
from samgraft.shared.fetch import NILEARN, cache_folder, extract_members, fetch_file
from samgraft.shared.files import file_sha256

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

VERSION = "0.68.1"
BUNDLE_MEMBER = "nilearn/_assets/js/niivue.umd.js"
BUNDLE_FILE = "niivue.umd.js"
BUNDLE_SHA256 = "c40dc2679c337c906deef22e157ee02c17459db9b8ecc51aa773af27791a567c"
LICENCE_FILE = Path(__file__).parent / "niivue_licence.txt"
VENDOR_FOLDER = Path(__file__).parent / "vendor"

MAX_VOXELS = 1_500_000
"""Largest number of voxels of an embedded scan, about 1 MB of compressed grey values. Larger scans are subsampled."""
FOUND, MISSED, EXTRA, CONFUSED = 1, 2, 3, 4
KEY = (
    {"name": "found (true and predicted)", "rgb": [47, 143, 91]},
    {"name": "missed (only true)", "rgb": [31, 95, 168]},
    {"name": "extra (only predicted)", "rgb": [196, 87, 43]},
    {"name": "another class predicted", "rgb": [123, 79, 163]},
)


@dataclass(frozen=True, kw_only=True)
class ViewedCase:
    """Scan with truth and prediction for the viewer."""

    title: str
    image_ZHW: Array
    """Grey values in [0, 1]."""
    true_ZHW: Array
    predicted_ZHW: Array
    affine: npt.NDArray[np.float64]
    """Voxel (x, y, z) to RAS+ mm."""


def find_bundle() -> str | None:
    """Return niivue's script if the pinned version was downloaded, else None."""
    path = VENDOR_FOLDER / BUNDLE_FILE
    if not path.is_file():
        return None
    if file_sha256(path) != BUNDLE_SHA256:
        log.warning("%s is not used, it is not the pinned niivue %s. Run make install.", BUNDLE_FILE, VERSION)
        return None
    return path.read_text(encoding="utf-8")


def download_bundle(cache: Path) -> None:
    """Take niivue from nilearn's wheel into the folder next to this file.

    Raises:
        StorageError: If the wheel is not cached and cannot be downloaded.
        DataError: If the download has another sha256.
    """
    archive = fetch_file(NILEARN, cache=cache)
    (VENDOR_FOLDER / BUNDLE_FILE).unlink(missing_ok=True)
    extract_members(archive, {BUNDLE_MEMBER: VENDOR_FOLDER / BUNDLE_FILE})


def fetch_bundle() -> str | None:
    """Return niivue's script, downloaded if needed, or None after a warning with the reason."""
    if find_bundle() is None:
        try:
            download_bundle(cache_folder())
        except (SamgraftError, OSError) as err:  # offline, or an installation that may not be changed
            log.warning("The report has no 3D viewer: %s The next report tries again.", err)
    return find_bundle()


def viewer_html(cases: Sequence[ViewedCase]) -> str:
    """Return the HTML of the viewer, without its scripts."""
    options, data = [], []
    for place, case in enumerate(cases):
        scan, marks, center = _embed(case)
        data.append(f'<script type="application/octet-stream" id="scan-{place}">{scan}</script>')
        data.append(f'<script type="application/octet-stream" id="marks-{place}">{marks}</script>')
        options.append(f'<option data-center="{json.dumps(center)}">{html.escape(case.title)}</option>')
    key = "".join(
        f'<span><span class="key" style="background:rgb{tuple(entry["rgb"])}"></span>{entry["name"]}</span>'
        for entry in KEY
    )
    licence = html.escape(LICENCE_FILE.read_text(encoding="utf-8"))
    return (
        f'<div class="viewer" id="viewer" data-state="off" data-key=\'{html.escape(json.dumps(KEY))}\'>'
        f"<p><label>Case <select>{''.join(options)}</select></label>"
        '<label>Opacity <input type="range" min="0" max="1" step="0.05" value="0.6"></label></p>'
        '<div class="stage"><canvas aria-label="Three planes and a 3D view of the chosen scan"></canvas></div>'
        f'<p class="keys">{key}</p><p class="state">The viewer needs scripts to be allowed.</p>'
        f"<details><summary>Viewer: NiiVue {VERSION}, BSD 2-Clause</summary><pre>{licence}</pre></details></div>"
        + "".join(data)
    )


def viewer_scripts(bundle: str) -> list[str]:
    """Return the scripts that the HTML of the viewer needs."""
    return [bundle, (Path(__file__).parent / "viewer.js").read_text(encoding="utf-8")]


def agreement(true: Array, predicted: Array) -> npt.NDArray[np.uint8]:
    """Mark every voxel as ``FOUND``, ``MISSED``, ``EXTRA`` or ``CONFUSED``, or 0 for background in both."""
    marks = np.zeros(true.shape, dtype=np.uint8)
    marks[(true > 0) & (predicted == true)] = FOUND
    marks[(true > 0) & (predicted == 0)] = MISSED
    marks[(true == 0) & (predicted > 0)] = EXTRA
    marks[(true > 0) & (predicted > 0) & (predicted != true)] = CONFUSED
    return marks


def _embed(case: ViewedCase) -> tuple[str, str, list[float]]:
    """Return scan and marks as base64 NIfTI, and the first position as fractions of x, y, z."""
    step = subsampling_steps(case.image_ZHW.shape)
    cut = tuple(slice(None, None, s) for s in step)
    grey = np.rint(np.clip(case.image_ZHW[cut], 0, 1) * 255).astype(np.uint8)
    marks = agreement(case.true_ZHW, case.predicted_ZHW)[cut]
    # Fewer voxels of the same extent: the columns of the affine grow with the steps.
    affine = case.affine.copy()
    affine[:3, :3] = affine[:3, :3] * np.asarray(step[::-1])
    # The viewer opens at a voxel with a mark, or in the middle of the scan without one.
    places = np.argwhere(marks)
    middle = places[len(places) // 2] if len(places) else np.asarray(marks.shape) // 2
    # niivue reorders the axes so that they grow to the right, front and head.
    fractions = [(int(n) + 0.5) / size for n, size in zip(middle[::-1], marks.shape[::-1], strict=True)]
    return _nifti(grey, affine), _nifti(marks, affine), _canonical(fractions, affine)


def subsampling_steps(shape_zyx: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the steps between kept slices, rows and columns."""
    # Rows and columns are thinned first, because they are usually finer than the distance of slices.
    step = [1, 1, 1]
    while np.prod([-(-n // s) for n, s in zip(shape_zyx, step, strict=True)]) > MAX_VOXELS:
        kept = [-(-n // s) for n, s in zip(shape_zyx, step, strict=True)]
        axes = (1, 2) if kept[1] * kept[2] >= kept[0] ** 2 else (0,)
        for axis in axes:
            step[axis] += 1
    return step[0], step[1], step[2]


def _canonical(fractions: list[float], affine: npt.NDArray[np.float64]) -> list[float]:
    """Convert fractions along x, y, z of the array to fractions along right, front, head."""
    result = [0.5, 0.5, 0.5]
    for axis, fraction in enumerate(fractions):
        column = affine[:3, axis]
        world = int(np.abs(column).argmax())
        result[world] = round(fraction if column[world] > 0 else 1 - fraction, 4)
    return result


def _nifti(array_ZHW: Array, affine: npt.NDArray[np.float64]) -> str:
    import nibabel as nib

    image = nib.Nifti1Image(np.ascontiguousarray(array_ZHW.transpose(2, 1, 0)), affine)
    # With a fixed time in the gzip header equal reports have equal bytes.
    return base64.b64encode(gzip.compress(image.to_bytes(), mtime=0)).decode()


def main() -> int:
    """Download niivue, or print a warning that reports have no viewer yet."""
    try:
        if find_bundle() is None:
            download_bundle(cache_folder())
    except StorageError as error:
        sys.stderr.write(f"warning: reports have no 3D viewer yet, the next report tries again.\n{error.render()}\n")
    except SamgraftError as error:
        sys.stderr.write(error.render() + "\n")
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
