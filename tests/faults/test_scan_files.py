"""Damaged and odd scan files, each refused with the reason or read with the right values."""

import gzip
import io
import struct

import nibabel as nib
import numpy as np
import pytest
from dicom_factory import new_dataset, save, set_pixels, write_enhanced, write_series, write_slice
from PIL import Image
from samgraft.shared.errors import DataError
from samgraft.shared.scans.case import SourceCase
from samgraft.shared.scans.readers.registry import read_scan
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality, volume_from_scan
from samgraft.shared.store.examine import BuildSettings, examine_case
from store_factory import make_scan, nifti_files, write_nifti

IMAGE, LABEL = make_scan(shape_zyx=(6, 24, 20))
SETTINGS = BuildSettings(modality=Modality.MRI, salt="")


def read(path, **options):
    return read_scan(ScanFiles(format=ScanFormat.NIFTI, paths=(path,), name=path.name, **options))


def slices(scan):
    return volume_from_scan(scan, modality=Modality.MRI, where="x").array_zyx


def edit(path, offset, fmt, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into(fmt, data, offset, *values)
    path.write_bytes(data)


@pytest.fixture
def nii(tmp_path):
    return write_nifti(tmp_path / "a.nii", IMAGE)


@pytest.fixture
def gz(tmp_path):
    return write_nifti(tmp_path / "a.nii.gz", IMAGE)


# Compression and content -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_read_nifti__truncated_gzip_is_refused(gz, keep):
    data = gz.read_bytes()
    gz.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=r"damaged|cut short"):
        read(gz)


@pytest.mark.parametrize("change", ["crc", "no trailer", "tail byte"])
def test_read_nifti__wrong_gzip_checksum_is_refused(gz, change):
    data = bytearray(gz.read_bytes())
    if change == "crc":
        data[-6] ^= 1
    gz.write_bytes(data[:-8] if change == "no trailer" else data[:-1] if change == "tail byte" else data)
    assert np.asarray(nib.load(gz).dataobj).size if change == "crc" else True  # nibabel reads it without an error
    with pytest.raises(DataError, match="gzip data is damaged or cut short"):
        read(gz)


def test_read_nifti__content_decides_and_not_the_name(nii, gz, tmp_path):
    plain = tmp_path / "plain.nii.gz"
    plain.write_bytes(nii.read_bytes())
    packed = tmp_path / "packed.nii"
    packed.write_bytes(gz.read_bytes())
    for path in (plain, packed):
        np.testing.assert_array_equal(slices(read(path)), IMAGE)
    half = tmp_path / "half.hdr"
    edit(nii, 344, "4s", b"ni1\0")
    half.write_bytes(nii.read_bytes()[:348])
    with pytest.raises(DataError, match="pair"):
        read(half)
    text = tmp_path / "text.nii"
    text.write_text("<html>not found</html>" * 50)
    with pytest.raises(DataError, match="must be NIfTI"):
        read(text)


def test_read_nifti__truncated_plain_file_is_refused(nii):
    nii.write_bytes(nii.read_bytes()[:-1])
    with pytest.raises(DataError, match="cut short: the header announces"):
        read(nii)


# Impossible headers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "fmt", "values", "message"),
    [
        (40, "<8h", (3, 32767, 32767, 32767, 1, 1, 1, 1), r"cut short|damaged"),
        (40, "<8h", (3, -5, 24, 6, 1, 1, 1, 1), "positive sizes|damaged"),
        (76, "<8f", (1, float("nan"), 1, 1, 0, 0, 0, 0), None),
        (280, "<4f", (0, 0, 0, 0), "positive|degenerate|0.01..50"),
        (70, "<h", (9999,), "damaged"),
        (108, "<f", (-5.0,), "offset"),
        (70, "<h", (128,), "color|damaged|cut short"),
    ],
)
def test_read_nifti__impossible_header_is_refused_before_allocation(nii, offset, fmt, values, message):
    edit(nii, offset, fmt, *values)
    if message is None:  # spacing comes from the sform: a broken pixdim alone changes nothing
        np.testing.assert_array_equal(slices(read(nii)), IMAGE)
    else:
        with pytest.raises(DataError, match=message):
            slices(read(nii))


# Values and geometry of NIfTI files --------------------------------------------------------------------------------


def test_examine_case__nan_is_counted_and_zeroed_on_request(tmp_path):
    image = IMAGE.astype(np.float32)
    image[2, 3, :4] = [np.nan, np.inf, -np.inf, np.nan]
    case = SourceCase(name="a", patient_key="a", scan=nifti_files(write_nifti(tmp_path / "a.nii", image)))
    with pytest.raises(DataError, match=r"4 of 2880 voxels \(0\.14 %\) are NaN or Inf"):
        examine_case(case, SETTINGS)
    settings = BuildSettings(modality=Modality.MRI, salt="", zero_non_finite=True)
    examined = examine_case(case, settings)
    volume = examined.images[examined.record.plane]
    assert (volume[2, 3, :4] == 0).all()
    np.testing.assert_array_equal(volume[3], image[3])
    assert "were NaN or Inf" in examined.record.notes[0]


@pytest.mark.parametrize("slope", [0.0, float("nan"), float("inf")])
def test_read_nifti__unusable_slope_keeps_raw_values(nii, slope):
    edit(nii, 112, "<2f", slope, 5.0)
    scan = read(nii)
    np.testing.assert_array_equal(slices(scan), IMAGE)
    assert "raw values used" in scan.notes[0]


@pytest.mark.parametrize(("slope", "intercept", "dtype"), [(2.0, -1024.0, "int16"), (0.5, 0.0, "float32")])
def test_read_nifti__slope_is_applied(nii, slope, intercept, dtype):
    edit(nii, 112, "<2f", slope, intercept)
    out = slices(read(nii))
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, IMAGE * slope + intercept)


def test_read_nifti__four_dimensions_need_a_frame(tmp_path):
    path = tmp_path / "a.nii"
    stack = np.stack([IMAGE.T, IMAGE.T + 1], axis=3)
    nib.save(nib.Nifti1Image(stack, np.diag([-1, -1, 5, 1])), path)
    with pytest.raises(DataError, match=r"4D with 2 volumes.*--frame 0"):
        read(path)
    np.testing.assert_array_equal(slices(read(path, frame=1)), IMAGE + 1)
    with pytest.raises(DataError, match=r"0\.\.1, got 7"):
        read(path, frame=7)


def test_read_nifti__color_is_refused(tmp_path):
    rgb = np.zeros((8, 8, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(DataError, match="R/G/B color"):
        read(tmp_path / "a.nii")


def test_read_nifti__contradicting_qform_and_sform_are_refused(nii, tmp_path):
    image = nib.load(nii)
    moved = image.affine.copy()
    moved[0, 3] += 3
    image.set_qform(moved, code=1)
    image.set_sform(image.affine, code=1)
    nib.save(image, tmp_path / "b.nii")
    with pytest.raises(DataError, match="qform and sform must agree within 1 mm"):
        read(tmp_path / "b.nii")


def test_read_nifti__sheared_grid_is_refused(tmp_path):
    affine = np.diag([-1.0, -1, 3, 1])
    affine[0, 1] = 0.2
    image = nib.Nifti1Image(IMAGE.T, affine)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(DataError, match="shear"):
        slices(read(tmp_path / "a.nii"))


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1000.0), ("meter", 0.001)])
def test_read_nifti__units_are_converted_to_mm(tmp_path, unit, factor):
    image = nib.Nifti1Image(IMAGE.T, np.diag([-factor, -factor, 5 * factor, 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    scan = read(tmp_path / "a.nii")
    volume = volume_from_scan(scan, modality=Modality.MRI, where="x")
    np.testing.assert_allclose(volume.spacing_mm, (5, 1, 1), rtol=1e-6)
    assert any(unit in note for note in scan.notes)


@pytest.mark.parametrize("spacing", [0.001, 100.0])
def test_read_nifti__implausible_spacing_is_refused(tmp_path, spacing):
    path = write_nifti(tmp_path / "a.nii", IMAGE, spacing_mm=(spacing, spacing, spacing))
    with pytest.raises(DataError, match=r"0\.01\.\.50"):
        read(path)


# DICOM series ------------------------------------------------------------------------------------------------------


def dicom(paths, **options):
    return read_scan(ScanFiles(format=ScanFormat.DICOM, paths=tuple(paths), name="series", **options))


def test_read_dicom_series__slices_are_sorted_by_position(tmp_path):
    scan = dicom(write_series(tmp_path, IMAGE))
    np.testing.assert_array_equal(slices(scan), IMAGE)
    np.testing.assert_allclose(scan.affine, np.diag([-1, -1, 3, 1]))


def test_read_dicom_series__gap_is_refused_or_accepted_on_request(tmp_path):
    paths = write_series(tmp_path, IMAGE)
    del paths[3]
    with pytest.raises(DataError, match=r"gap at z=2 \(3\.00 to 6\.00 mm\)"):
        dicom(paths)
    scan = dicom(paths, allow_gaps=True)
    assert slices(scan).shape[0] == 5
    assert any("accepted" in note for note in scan.notes)


def test_read_dicom_series__shared_position_is_refused(tmp_path):
    paths = write_series(tmp_path, IMAGE)
    paths.append(write_slice(tmp_path / "copy", IMAGE[0], z=0.0))
    with pytest.raises(DataError, match="1 share one"):
        dicom(paths)


def test_discover__two_series_and_a_localizer_in_one_folder_are_separated(tmp_path):
    write_series(tmp_path / "a", IMAGE)
    write_series(tmp_path / "a" / "more", IMAGE + 5, SeriesInstanceUID="1.2.3.5")
    for path in (tmp_path / "a" / "more").iterdir():
        path.rename(tmp_path / "a" / f"second_{path.name}")
    (tmp_path / "a" / "more").rmdir()
    write_slice(tmp_path / "a" / "scout", IMAGE[0], z=0, SeriesInstanceUID="7", ImageType=["ORIGINAL", "LOCALIZER"])
    found = discover(tmp_path)
    assert len(found.cases) == 2
    assert sorted(len(case.scan.paths) for case in found.cases) == [6, 6]
    assert {case.patient_key for case in found.cases} == {"P1"}
    assert found.left_out["DICOM localizer"] == 1


def test_read_dicom_series__mixed_orientation_is_refused(tmp_path):
    paths = write_series(tmp_path, IMAGE)
    ds = new_dataset(ImagePositionPatient=[0, 0, 30], ImageOrientationPatient=[0, 1, 0, 0, 0, -1], PixelSpacing=[1, 1])
    set_pixels(ds, IMAGE[0])
    paths.append(save(ds, tmp_path / "odd"))
    with pytest.raises(DataError, match="parallel"):
        dicom(paths)
    # In a folder, orientation separates them into two scans.
    assert len(discover(tmp_path).cases) == 2


def test_read_dicom_series__truncated_slice_is_refused(tmp_path):
    paths = write_series(tmp_path, IMAGE)
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cannot be decoded"):
        dicom(paths)


def test_read_dicom_series__monochrome1_is_inverted_once(tmp_path):
    stored = (4095 - IMAGE).astype(np.uint16)
    paths = []
    for z in range(6):
        ds = new_dataset(
            ImagePositionPatient=[0, 0, 3 * z], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1]
        )
        set_pixels(ds, stored[z], photometric="MONOCHROME1", bits=12)
        paths.append(save(ds, tmp_path / str(z)))
    scan = dicom(paths)
    np.testing.assert_array_equal(slices(scan), IMAGE)
    assert any("MONOCHROME1" in note for note in scan.notes)


def test_read_dicom_series__color_is_refused_and_gray_rgb_is_read(tmp_path):
    gray = IMAGE[2].clip(0, 255).astype(np.uint8)
    rgb = np.repeat(gray[..., None], 3, axis=2)
    paths = []
    for name, pixels in (("gray", rgb), ("color", rgb * np.array([1, 0, 1], dtype=np.uint8))):
        ds = new_dataset(
            ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1]
        )
        set_pixels(ds, pixels, photometric="RGB")
        paths.append(save(ds, tmp_path / name))
    np.testing.assert_array_equal(slices(dicom(paths[:1]))[0], gray)
    with pytest.raises(DataError, match="color"):
        dicom(paths[1:])


def test_read_dicom_series__enhanced_multi_frame_with_a_slope_per_frame(tmp_path):
    np.testing.assert_array_equal(slices(dicom([write_enhanced(tmp_path / "e", IMAGE)])), IMAGE)
    slopes = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    scan = dicom([write_enhanced(tmp_path / "s", IMAGE, slopes=slopes)])
    np.testing.assert_array_equal(slices(scan), IMAGE * np.array(slopes)[:, None, None])


def test_read_dicom_series__cine_without_positions_is_read(tmp_path):
    ds = new_dataset(Modality="US")
    set_pixels(ds, IMAGE.clip(0, 255).astype(np.uint8))
    scan = dicom([save(ds, tmp_path / "us")])
    np.testing.assert_array_equal(slices(scan), IMAGE.clip(0, 255))
    assert any("1 mm apart" in note for note in scan.notes)


def test_read_dicom_series__slope_per_slice_is_applied(tmp_path):
    paths = [
        write_slice(tmp_path / str(z), IMAGE[z], z=3.0 * z, RescaleSlope=z + 1, RescaleIntercept=-7) for z in range(6)
    ]
    np.testing.assert_array_equal(slices(dicom(paths)), IMAGE * np.arange(1, 7)[:, None, None] - 7)


def test_read_dicom_series__missing_codec_is_named(tmp_path):
    ds = new_dataset(ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1])
    set_pixels(ds, IMAGE[0])
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless

    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
    ds.PixelData = encapsulate([b"\xff\x4f\xff\x51" + b"\0" * 60])
    ds["PixelData"].is_undefined_length = True
    with pytest.raises(DataError, match=r"JPEG 2000.*cannot be decoded.*samgraft\[dicom\]"):
        dicom([save(ds, tmp_path / "j2k")])


def test_examine_case__modality_of_the_header_must_fit(tmp_path):
    write_series(tmp_path / "ct", IMAGE, Modality="CT")
    case = discover(tmp_path).cases[0]
    with pytest.raises(DataError, match="must be mri, got CT in the DICOM header"):
        examine_case(case, SETTINGS)
    examine_case(case, BuildSettings(modality=Modality.CT, salt=""))


def test_discover__other_dicom_objects_are_counted(tmp_path):
    write_series(tmp_path, IMAGE)
    save(new_dataset(sop_class="1.2.840.10008.5.1.4.1.1.88.11", Modality="SR"), tmp_path / "report.dcm")
    (tmp_path / "DICOMDIR").write_bytes(b"x" * 200)
    (tmp_path / "readme").write_text("hello")
    (tmp_path / "broken.dcm").write_text("hello")
    found = discover(tmp_path)
    assert len(found.cases) == 1
    assert found.left_out["DICOM without pixels (report, plan, contours)"] == 1
    assert found.left_out["DICOMDIR (files are found without it)"] == 1
    assert found.left_out["not a scan"] == 1
    assert found.left_out["file with a DICOM name that is not DICOM"] == 1


def test_examine_case__privacy_is_reported_without_values(tmp_path):
    write_series(tmp_path, IMAGE, PatientName="Roe^Jane", PatientIdentityRemoved="NO", BurnedInAnnotation="YES")
    case = discover(tmp_path).cases[0]
    with pytest.raises(DataError, match="burned into the pixels"):
        examine_case(case, SETTINGS)
    examined = examine_case(case, BuildSettings(modality=Modality.MRI, salt="", accept_burned_in=True))
    text = " ".join(examined.privacy)
    assert "PatientName" in text
    assert "0012,0062" in text
    assert "Roe" not in text + str(examined.record)


# Pictures ----------------------------------------------------------------------------------------------------------


def picture(path, array, *, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def stack(paths, **options):
    return slices(read_scan(ScanFiles(format=ScanFormat.IMAGES, paths=tuple(paths), name="stack"), **options))


def test_read_image_stack__sixteen_bit_in_natural_order(tmp_path):
    image = IMAGE.astype(np.uint16) * 50
    paths = [picture(tmp_path / f"s{z + 8}.png", image[z]) for z in range(6)]  # s8 ... s13
    np.testing.assert_array_equal(stack(paths[::-1]), image)


def test_read_image_stack__palette_label_keeps_its_ids(tmp_path):
    ids = (LABEL[2] * 7).astype(np.uint8)
    image = Image.new("P", (20, 24))
    image.putdata(ids.ravel().tolist())
    image.putpalette([i % 256 for i in range(768)][::-1])
    image.save(tmp_path / "p.png")
    np.testing.assert_array_equal(stack([tmp_path / "p.png"], as_label=True)[0], ids)


@pytest.mark.parametrize("mode", ["1", "LA", "RGB", "RGBA", "I;16", "F"])
def test_read_image_stack__gray_modes_keep_their_values(tmp_path, mode):
    gray = np.where(LABEL[2] > 0, 255, 0).astype(np.uint8)
    if mode == "I;16":
        picture(tmp_path / "a.png", gray.astype(np.uint16))
    elif mode == "F":
        picture(tmp_path / "a.tif", gray.astype(np.float32))
    else:
        picture(tmp_path / "a.png", gray, mode=mode)
    out = stack([next(tmp_path.glob("a.*"))])[0]
    np.testing.assert_array_equal(out > 0, gray > 0)


def test_read_image_stack__color_is_refused(tmp_path):
    rgb = np.zeros((24, 20, 3), dtype=np.uint8)
    rgb[..., 0] = 9
    with pytest.raises(DataError, match="must be gray, got color"):
        stack([picture(tmp_path / "a.png", rgb)])


def test_read_image_stack__exif_rotation_is_applied_to_scans_and_refused_for_labels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = picture(tmp_path / "a.png", IMAGE[0].clip(0, 255).astype(np.uint8), exif=exif)
    np.testing.assert_array_equal(stack([path])[0], np.rot90(IMAGE[0].clip(0, 255), -1))
    with pytest.raises(DataError, match="EXIF"):
        stack([path], as_label=True)


def test_read_image_stack__interlaced_and_multi_page_are_read_and_truncated_refused(tmp_path):
    path = picture(tmp_path / "a.png", IMAGE[0].astype(np.uint16))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match="damaged"):
        stack([path])
    pages = [Image.fromarray(s.astype(np.uint16)) for s in IMAGE]
    pages[0].save(tmp_path / "m.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(stack([tmp_path / "m.tif"]), IMAGE)


def test_read_image_stack__jpeg_label_is_refused(tmp_path):
    path = picture(tmp_path / "a.jpg", LABEL[0])
    with pytest.raises(DataError, match="must not be JPEG"):
        stack([path], as_label=True)


def test_read_image_stack__two_sizes_are_refused(tmp_path):
    paths = [
        picture(tmp_path / "a.png", np.zeros((9, 9), np.uint8)),
        picture(tmp_path / "b.png", np.zeros((9, 8), np.uint8)),
    ]
    with pytest.raises(DataError, match="one size"):
        stack(paths)


# NumPy -------------------------------------------------------------------------------------------------------------


def test_read_numpy__round_trip_and_refusals(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, IMAGE)
    (tmp_path / "a.json").write_text('{"spacing_mm": [5, 1, 2]}')
    files = ScanFiles(format=ScanFormat.NUMPY, paths=(path,), name="a")
    volume = volume_from_scan(read_scan(files), modality=Modality.MRI, where="x")
    np.testing.assert_array_equal(volume.array_zyx, IMAGE)
    assert volume.spacing_mm == (5, 1, 2)
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    with pytest.raises(DataError, match="damaged, cut"):
        read_scan(files)
    path.write_bytes(good + b"xx")
    with pytest.raises(DataError, match="2 bytes follow"):
        read_scan(files)
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    path.write_bytes(stream.getvalue())
    with pytest.raises(DataError, match="Python objects"):
        read_scan(files)


def test_read_nifti__data_longer_than_announced_is_refused(tmp_path, nii):
    path = tmp_path / "long.nii.gz"
    path.write_bytes(gzip.compress(nii.read_bytes() + b"\0" * 1000))
    with pytest.raises(DataError, match="is longer than"):
        read(path)


def test_read_nifti__several_gzip_members_and_zero_padding_are_read(tmp_path, nii):
    data = nii.read_bytes()
    path = tmp_path / "members.nii.gz"
    path.write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]) + b"\0" * 64)
    np.testing.assert_array_equal(slices(read(path)), IMAGE)
    path.write_bytes(gzip.compress(data) + b"garbage")
    with pytest.raises(DataError, match="damaged"):
        read(path)
