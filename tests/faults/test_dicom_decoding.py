"""Decoding of compressed DICOM in a process that may crash, hang or allocate too much."""

import os
import sys
import textwrap
import time

import numpy as np
import pydicom
import pytest
from dicom_factory import new_dataset, save, set_pixels, write_series
from pydicom.uid import JPEG2000Lossless, RLELossless
from samgraft.shared.errors import DataError
from samgraft.shared.scans.readers import decode_process
from samgraft.shared.scans.readers.decode_process import DecodeProcess, DecoderError
from samgraft.shared.scans.readers.dicom import read_dicom_series
from store_factory import make_scan

IMAGE = make_scan(shape_zyx=(3, 24, 20))[0]


def compress(path):
    ds = pydicom.dcmread(path)
    ds.compress(RLELossless)
    ds.save_as(path)
    return path


def fake_decoder(tmp_path, body, *, timeout_s=20.0):
    """Return a decoder that runs ``body`` for every request."""
    program = tmp_path / "decoder.py"
    program.write_text(
        "import os, signal, struct, sys, time\n"
        "read = sys.stdin.buffer\n"
        "while head := read.read(8):\n"
        "    read.read(struct.unpack('<Q', head)[0])\n" + textwrap.indent(textwrap.dedent(body), "    ")
    )
    return DecodeProcess([sys.executable, str(program)], timeout_s=timeout_s)


def test_read_dicom_series__compressed_equals_uncompressed(tmp_path):
    plain = read_dicom_series(write_series(tmp_path / "a", IMAGE), where="a")
    packed_paths = [compress(path) for path in write_series(tmp_path / "b", IMAGE)]
    packed = read_dicom_series(packed_paths, where="b")
    np.testing.assert_array_equal(packed.array_ijk, plain.array_ijk)
    assert packed.array_ijk.dtype == plain.array_ijk.dtype
    np.testing.assert_array_equal(packed.affine, plain.affine)


def test_decode_process__serves_all_files_and_ends_with_its_owner(tmp_path):
    paths = [compress(path) for path in write_series(tmp_path, IMAGE)]
    with_pid = DecodeProcess()
    try:
        first = with_pid.decode(paths[0].read_bytes())
        pid = with_pid._process.pid
        assert with_pid.decode(paths[1].read_bytes()).shape == first.shape
        assert with_pid._process.pid == pid
        with pytest.raises(DecoderError):
            with_pid.decode(paths[0].read_bytes()[:-200])
        assert with_pid.decode(paths[2].read_bytes()).shape == first.shape
        assert with_pid._process.pid == pid
    finally:
        with_pid.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"the decoder crashed \(signal 11\)"),
        ("os.kill(os.getpid(), signal.SIGFPE)", r"the decoder crashed \(signal 8\)"),
        ("os._exit(3)", r"the decoder crashed \(exit code 3\)"),
        ("os.write(1, b'+' + struct.pack('<Q', 2**40))", "more pixels than the limit"),
        ("os.write(1, b'+' + struct.pack('<Q', 9) + b'no pixels')", "not a picture"),
        ("os.write(1, b'-' + struct.pack('<Q', 7) + b'too bad')", "too bad"),
        ("""x = b'{"dtype": "|O", "shape": [1]}\\n' + b'1' * 8
os.write(1, b'+' + struct.pack('<Q', len(x)) + x)""", "not a picture"),
    ],
)  # fmt: skip
def test_decode_process__faulty_decoder_gives_an_error(tmp_path, body, message):
    decoder = fake_decoder(tmp_path, body)
    for _ in range(2):  # and the next file gets a new one
        with pytest.raises(DecoderError, match=message):
            decoder.decode(b"DICM")
    decoder.close()


def test_decode_process__hanging_decoder_is_killed(tmp_path):
    decoder = fake_decoder(tmp_path, "time.sleep(60)", timeout_s=1.0)
    begin = time.monotonic()
    with pytest.raises(DecoderError, match="took longer than 1 s and was ended"):
        decoder.decode(b"DICM")
    assert time.monotonic() - begin < 20


def test_read_dicom_series__decoder_crash_refuses_the_series(tmp_path, monkeypatch):
    paths = [compress(path) for path in write_series(tmp_path / "a", IMAGE)]
    decoder = fake_decoder(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(decode_process, "_shared", decoder)
    with pytest.raises(DataError, match=r"RLE Lossless.*cannot be decoded: the decoder crashed \(signal 11\)"):
        read_dicom_series(paths, where="a")


def test_read_dicom_series__announced_size_is_refused_before_decoding(tmp_path, monkeypatch):
    def never():
        raise AssertionError("decoded")

    monkeypatch.setattr(decode_process, "shared_process", never)
    ds = new_dataset(ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1])
    set_pixels(ds, IMAGE[0])
    ds.compress(RLELossless)
    ds.NumberOfFrames, ds.Rows, ds.Columns = 4000, 40_000, 40_000
    with pytest.raises(DataError, match=r"announces 11921 GiB of pixels"):
        read_dicom_series([save(ds, tmp_path / "bomb")], where="bomb")


def test_read_dicom_series__random_bytes_as_pixels_are_refused(tmp_path):
    """Noise gives an error in every installed decoder, and this process continues."""
    from pydicom.encaps import encapsulate

    rng = np.random.default_rng(0)
    for syntax in (JPEG2000Lossless, RLELossless, "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.80"):
        for number in range(2):
            ds = new_dataset(
                ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1]
            )
            set_pixels(ds, IMAGE[0])
            ds.file_meta.TransferSyntaxUID = syntax
            ds.PixelData = encapsulate([rng.bytes(400)])
            ds["PixelData"].is_undefined_length = True
            with pytest.raises(DataError, match="cannot be decoded"):
                read_dicom_series([save(ds, tmp_path / f"{syntax}-{number}")], where="noise")


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_decode_process__memory_is_limited(tmp_path, monkeypatch):
    """The real process returns an error when it reaches its limit."""
    program = tmp_path / "limited.py"
    program.write_text(
        "import numpy as np\n"
        "from samgraft.shared.scans.readers import decode_process as d\n"
        "import pydicom\n"
        "def hungry(file):\n"
        "    np.ones(9 * 2**30, dtype='u1')\n"
        "pydicom.dcmread = hungry\n"
        "d._serve()\n"
    )
    decoder = DecodeProcess([sys.executable, str(program)])
    with pytest.raises(DecoderError, match="needs more than 8 GiB"):
        decoder.decode(b"x")
    decoder.close()
