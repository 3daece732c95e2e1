"""Values and sizes that a reader could change on the way: pictures, TIFF, NRRD, NIfTI and complex data."""

import struct
import zlib

import nibabel as nib
import nrrd
import numpy as np
import pytest
from PIL import Image
from samgraft.shared.errors import DataError
from samgraft.shared.scans.header_check import check_headers
from samgraft.shared.scans.orientation import voxel_sizes
from samgraft.shared.scans.readers.registry import format_by_suffix, read_scan
from samgraft.shared.scans.readers.scan import ScanFiles
from samgraft.shared.scans.sources import discover
from store_factory import make_scan, write_nifti

GRAY = np.arange(40 * 36, dtype=np.uint16).reshape(40, 36) * 45
IMAGE, LABEL = make_scan(shape_zyx=(6, 24, 20))


def read(path, *, as_label=False, **options):
    files = ScanFiles(format=format_by_suffix(path), paths=(path,), name=path.name, **options)
    return read_scan(files, as_label=as_label)


def pixels(path, *, as_label=False):
    return read(path, as_label=as_label).array_ijk[:, :, 0].T


def write_png(path, array, *, depth=None):
    """Write a PNG of any bit depth and color type, which Pillow cannot."""
    array = array[..., None] if array.ndim == 2 else array
    height, width, channels = array.shape
    depth = depth or array.dtype.itemsize * 8
    if depth < 8:
        bits = np.unpackbits(array.astype(np.uint8), axis=2)[..., -depth:].reshape(height, -1)
        rows = [np.packbits(row).tobytes() for row in bits]
    else:
        rows = [row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array]

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_read_image_stack__16_bit_color_and_alpha_are_refused(tmp_path, channels):
    path = write_png(tmp_path / "a.png", np.repeat(GRAY[..., None], channels, axis=2))
    with pytest.raises(DataError, match="16-bit PNG must be plain gray"):
        read(path)
    assert len(check_headers(tmp_path).refused) == 1
    np.testing.assert_array_equal(pixels(write_png(tmp_path / "b.png", GRAY)), GRAY)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_read_image_stack__small_bit_depths_keep_their_values(tmp_path, depth):
    ids = np.arange(40 * 36).reshape(40, 36) % 2**depth
    path = write_png(tmp_path / "a.png", ids, depth=depth)
    np.testing.assert_array_equal(pixels(path, as_label=True), ids)
    np.testing.assert_array_equal(pixels(path), ids)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
@pytest.mark.parametrize("as_label", [True, False])
def test_read_image_stack__alpha_with_information_is_refused(tmp_path, mode, as_label):
    gray = np.full((40, 36), 7, dtype=np.uint8)
    alpha = np.zeros_like(gray)
    path = tmp_path / "a.png"
    for value, refused in ((0, False), (255, True)):
        alpha[10:20] = value
        if mode == "PA":
            picture = Image.fromarray(gray).convert("P")
            picture.info["transparency"] = bytes([0] * 7 + [value] + [0] * 248)
            if as_label:  # indices are ids, whatever is transparent
                refused = False
        else:
            picture = Image.fromarray(np.dstack([gray] * (len(mode) - 1) + [alpha]), mode if mode == "LA" else None)
        picture.save(path)
        if refused and mode != "PA":
            with pytest.raises(DataError, match="transparency differs"):
                read(path, as_label=as_label)
        else:
            assert np.unique(pixels(path, as_label=as_label)).size == 1


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint32", "float32"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_read_image_stack__tiff_of_every_type_keeps_its_values(tmp_path, dtype, byte_order):
    info = np.finfo(dtype) if dtype == "float32" else np.iinfo(dtype)
    values = np.linspace(float(info.min) / 2, float(info.max) / 2, 40 * 36).astype(dtype).reshape(40, 36)
    write_tiff(tmp_path / "a.tif", values, byte_order=byte_order)
    if (dtype, byte_order) == ("uint32", ">"):  # Pillow has no reader for it
        with pytest.raises(DataError, match="1 to 32 bits per pixel"):
            pixels(tmp_path / "a.tif")
        return
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif"), values)


def write_tiff(path, array, *, byte_order="<", photometric=1, description=""):
    """Write an uncompressed TIFF with explicit sample format, which Pillow cannot for all types."""
    data = array.astype(array.dtype.newbyteorder(byte_order)).tobytes()
    text = description.encode() + b"\0"
    sample_format = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    height, width = array.shape
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, array.dtype.itemsize * 8), (259, 3, 1, 1),
        (262, 3, 1, photometric), (270, 2, len(text), None), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height),
        (279, 4, 1, len(data)), (339, 3, 1, sample_format),
    ]  # fmt: skip
    start = 8 + len(data) + len(data) % 2
    text_at = start + 2 + 12 * len(entries) + 4
    table = struct.pack(f"{byte_order}H", len(entries))
    for tag, kind, count, value in entries:
        table += struct.pack(f"{byte_order}HHI", tag, kind, count)
        if value is None:
            table += text.ljust(4, b"\0") if len(text) <= 4 else struct.pack(f"{byte_order}I", text_at)
        elif kind == 3:
            table += struct.pack(f"{byte_order}HH", value, 0)
        else:
            table += struct.pack(f"{byte_order}I", value)
    mark = b"II*\0" if byte_order == "<" else b"MM\0*"
    body = mark + struct.pack(f"{byte_order}I", start) + data + b"\0" * (len(data) % 2) + table
    path.write_bytes(body + struct.pack(f"{byte_order}I", 0) + text)
    return path


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"photometric": 0}, "uint16", "WhiteIsZero"),
        ({"description": "ImageJ=1.53\nimages=5\nslices=5"}, "uint8", "announces 5 slices, 1 can be read"),
        ({"description": "ImageJ=1.53\nimages=1\nchannels=2"}, "uint8", "channels or time points"),
        ({"description": '<OME><Pixels SizeC="1" SizeT="4"/></OME>'}, "uint8", "channels or time points"),
        ({}, "float64", "1 to 32 bits per pixel"),
    ],
)
def test_read_image_stack__tiff_that_would_be_changed_is_refused(tmp_path, options, dtype, message):
    write_tiff(tmp_path / "a.tif", np.ones((40, 36), dtype=dtype), **options)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.tif")


def test_read_image_stack__white_is_zero_label_and_cmyk_are_refused(tmp_path):
    write_tiff(tmp_path / "a.tif", np.ones((40, 36), dtype=np.uint8), photometric=0)
    with pytest.raises(DataError, match="WhiteIsZero"):
        read(tmp_path / "a.tif", as_label=True)
    Image.new("CMYK", (36, 40), (0, 0, 0, 90)).save(tmp_path / "b.jpg")
    with pytest.raises(DataError, match="got CMYK pixels"):
        read(tmp_path / "b.jpg")


def test_read_image_stack__lossy_tiff_label_is_refused(tmp_path):
    Image.fromarray(np.zeros((40, 36), dtype=np.uint8)).save(tmp_path / "a.tif", compression="jpeg")
    assert pixels(tmp_path / "a.tif").max() == 0
    with pytest.raises(DataError, match="compressed with loss"):
        read(tmp_path / "a.tif", as_label=True)


def test_plain_cases__multi_page_tiffs_are_volumes_of_their_own(tmp_path):
    for name in ("a", "b"):
        for folder, volume in (("images", IMAGE.astype(np.uint16)), ("masks", LABEL)):
            (tmp_path / folder).mkdir(exist_ok=True)
            first, *others = [Image.fromarray(page) for page in volume]
            first.save(tmp_path / folder / f"{name}.tif", save_all=True, append_images=others)
    found = discover(tmp_path)
    assert [(case.name, len(case.labels)) for case in found.cases] == [("images/a.tif", 1), ("images/b.tif", 1)]
    np.testing.assert_array_equal(read_scan(found.cases[0].scan).array_ijk, IMAGE.T)


def test_plain_cases__slices_and_their_masks_in_one_folder_are_two_stacks(tmp_path):
    (tmp_path / "p1").mkdir()
    for z in range(6):
        Image.fromarray(IMAGE[z].astype(np.uint16)).save(tmp_path / "p1" / f"s{z}.png")
        Image.fromarray(LABEL[z]).save(tmp_path / "p1" / f"s{z}_mask.png")
    (case,) = discover(tmp_path).cases
    assert [len(case.scan.paths), *(len(label.scan.paths) for label in case.labels)] == [6, 6]


# NRRD and NIfTI ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "size", "spacing"), [("um", 500.0, 0.5), ("cm", 0.1, 1.0), ("mm", 2.0, 2.0), ("m", 0.001, 1.0)]
)
@pytest.mark.parametrize("field", ["space directions", "spacings"])
def test_read_nrrd__units_are_converted_to_mm(tmp_path, unit, size, spacing, field):
    header = {"spacings": [size] * 3, "units": [unit] * 3}
    if field == "space directions":
        header = {
            "space": "left-posterior-superior", "space origin": [size, 0, 0], "space units": [unit] * 3,
            "space directions": np.eye(3) * size,
        }  # fmt: skip
    nrrd.write(str(tmp_path / "a.nrrd"), IMAGE.T, header)
    scan = read(tmp_path / "a.nrrd")
    np.testing.assert_allclose(voxel_sizes(scan.affine), spacing)
    if field == "space directions":
        assert scan.affine[0, 3] == pytest.approx(-spacing)


def test_read_nrrd__impossible_units_and_directions_are_refused(tmp_path):
    base = {"space": "left-posterior-superior", "space origin": np.zeros(3)}
    for name, units in (("a", ["furlong"] * 3), ("b", ["mm", "mm", "cm"])):
        nrrd.write(
            str(tmp_path / f"{name}.nrrd"), IMAGE.T, {**base, "space directions": np.eye(3), "space units": units}
        )
        with pytest.raises(DataError, match="unit"):
            read(tmp_path / f"{name}.nrrd")
    assert len(check_headers(tmp_path).refused) == 2


@pytest.mark.parametrize("directions", [np.diag([0.2, 0.4]), np.array([[0.2, 0, 0], [0, 0.4, 0]])])
def test_read_nrrd__directions_of_a_2d_file_give_its_spacing(tmp_path, directions):
    header = {"space directions": directions, "space origin": np.zeros(directions.shape[1])}
    header |= {"space dimension": 2} if directions.shape[1] == 2 else {"space": "left-posterior-superior"}
    nrrd.write(str(tmp_path / "a.nrrd"), GRAY.T, header)
    scan = read(tmp_path / "a.nrrd")
    np.testing.assert_allclose(voxel_sizes(scan.affine), [0.2, 0.4, 1.0])
    np.testing.assert_array_equal(scan.array_ijk[:, :, 0], GRAY.T)


@pytest.mark.parametrize("code", [4, 5, 7, 255])
def test_read_nifti__undefined_unit_is_taken_as_mm_with_a_note(tmp_path, code):
    path = write_nifti(tmp_path / "a.nii", IMAGE)
    data = bytearray(path.read_bytes())
    data[123] = code
    path.write_bytes(bytes(data))
    scan = read(path)
    np.testing.assert_allclose(voxel_sizes(scan.affine), [1, 1, 5])
    assert "unknown unit of length in the header: taken as mm" in scan.notes


def test_read_nifti__long_header_extension_is_skipped(tmp_path):
    image = nib.load(write_nifti(tmp_path / "a.nii", IMAGE))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"text " * 400))
    nib.save(image, tmp_path / "b.nii.gz")
    scan = read(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(scan.array_ijk, IMAGE.T)
    assert scan.privacy == ("NIfTI header extensions",)
    assert "NIfTI header extensions" in check_headers(tmp_path).kinds


@pytest.mark.parametrize("slope", [1.0, 2.0])
def test_read_scan__complex_voxels_are_refused(tmp_path, slope):
    image = nib.Nifti1Image((IMAGE.T * (1 + 1j)).astype(np.complex64), np.eye(4))
    image.header.set_slope_inter(slope, 0)
    nib.save(image, tmp_path / "a.nii")
    np.save(tmp_path / "b.npy", IMAGE * 1j)
    for name in ("a.nii", "b.npy"):
        with pytest.raises(DataError, match="real numbers"):
            read(tmp_path / name)
    assert sum(check_headers(tmp_path).refused.values()) == 1


def test_check_headers__finds_what_a_build_refuses_for_its_header(tmp_path):
    nib.save(nib.Nifti1Image(np.stack([IMAGE.T] * 2, axis=3), np.eye(4)), tmp_path / "four.nii")
    write_nifti(tmp_path / "huge.nii", IMAGE, spacing_mm=(5, 900, 1))
    cut = write_nifti(tmp_path / "cut.nii", IMAGE)
    cut.write_bytes(cut.read_bytes()[:-10])
    write_nifti(tmp_path / "good.nii", IMAGE)
    report = check_headers(tmp_path)
    assert (report.num_scans, sum(report.refused.values())) == (4, 3)
