"""Random damage to every kind of file that a user gives. The result is a value or a refusal, never a defect."""

import json
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import yaml
from dicom_factory import write_series
from finished_factory import make_lab
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataelem import RawDataElement
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.evaluation.postprocess import read_postprocessing
from samgraft.finetune.prompting.prompt_file import read_prompts, slice_prompts
from samgraft.finetune.task import Task
from samgraft.shared.config import load_config
from samgraft.shared.errors import SamgraftError
from samgraft.shared.samples.split import load_split
from samgraft.shared.scans.case import read_case
from samgraft.shared.scans.sources import discover
from samgraft.shared.store.store import SliceStore
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import read_weights
from samgraft.ssl.config import PretrainConfig

EXAMPLES = [25, pytest.param(1500, marks=pytest.mark.slow)]
REFUSALS = range(2, 7)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 6),
    st.sampled_from([2**31, -(2**63), 10**30]),
    st.floats(),
    st.sampled_from(["", "1", "a", "../x", "=1+1", "\x1b[31m", "é\n", "null", "nan", "axial", "\ud800"]),
    st.text(max_size=5),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, original):
    """Draw a copy of plain values with one to three changes at any depth."""
    copy = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        place = copy
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            if isinstance(place, dict) and draw(st.integers(0, 3)) == 0:
                del place[key]
            elif isinstance(place, dict) and draw(st.integers(0, 5)) == 0:
                place[draw(st.text(max_size=5))] = draw(values)
            else:
                place[key] = draw(values)
            break
    return copy


def check(strategy, body, examples):
    """Run a body on random values. It must return or refuse."""

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def run(value):
        with tempfile.TemporaryDirectory() as name:
            refusal = None
            try:
                body(value, Path(name))
            except SamgraftError as err:
                refusal = err
            assert refusal is None or (refusal.exit_code in REFUSALS and refusal.what), refusal

    run()


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"), num_patients=3)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_card__damaged_file(lab, examples):
    def body(content, folder):
        write_json(folder / "card.json", content)
        card = Card.read(folder / "card.json")
        assert card.image_size > 0

    check(damaged(json.loads((lab.run / "model" / "card.json").read_text())) | values, body, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_task__damaged_file(lab, examples):
    def body(content, folder):
        write_json(folder / "task.json", content)
        task = Task.read(folder)
        assert task.classes.num_classes == len(task.classes.names)
        assert task.inference().batch_size == 8
        assert task.warning is None or isinstance(task.warning, str)

    check(damaged(json.loads((lab.run / "model" / "task.json").read_text())) | values, body, examples)


POSTPROCESSING = {"weights_sha256": "a" * 64, "steps": {"1": ["largest_component"]}, "schema": 1}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_read_postprocessing__damaged_file(examples):
    classes = ClassTable(ids=(1, 2), names=("a", "b"))

    def body(content, folder):
        write_json(folder / "postprocessing.json", content)
        read_postprocessing(folder, weights_sha256="a" * 64, classes=classes).describe(classes)

    check(damaged(POSTPROCESSING) | values, body, examples)


PROMPTS = {
    "version": 1,
    "coordinates": "voxel",
    "prompts": [
        {"case": "a", "class": "core", "box": [[1, 2, 3], [4, 5, 3]]},
        {"class": 2, "points": [[1, 2, 3], [2, 2, 2]], "labels": [1, 0]},
    ],
}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_read_prompts__damaged_file(examples):
    classes = ClassTable(ids=(1, 2), names=("core", "rim"))

    def body(content, folder):
        (folder / "p.yaml").write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogatepass")
        file = read_prompts(folder / "p.yaml", classes)
        slice_prompts(
            file.prompts, file.frame, native_affine=np.diag([1.0, -2, 3, 1]), affine=np.diag([-1.0, -2, 3, 1]),
            shape_zyx=(6, 7, 8), on_note=lambda note: None,
        )  # fmt: skip

    check(damaged(PROMPTS) | values, body, examples)


SETTINGS = {
    "data": {"store": "a.zarr", "classes": [1, 2], "planes": ["axial"]},
    "optim": {"lr": 1e-4, "weight_decay": 0.1},
    "trainer": {"max_steps": 10, "precision": "fp32"},
    "model": {"base": "sam.pth", "image_size": 256},
}


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("schema", [FinetuneConfig, PretrainConfig])
def test_load_config__damaged_settings(schema, examples):
    def body(content, folder):
        (folder / "c.yaml").write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogatepass")
        load_config(schema, layers=[folder / "c.yaml"])

    check(damaged(SETTINGS) | values, body, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_load_config__any_text_as_yaml(examples):
    def body(content, folder):
        (folder / "c.yaml").write_bytes(content)
        load_config(FinetuneConfig, layers=[folder / "c.yaml"])

    text = st.text(alphabet="ab:-[]{}&*!|>%@`\"'#,? \n\t\x00\x1f01.é", max_size=40).map(lambda t: t.encode())
    check(text | st.binary(max_size=20), body, examples)


NNUNET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "lesion": 1, "rim": 2},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}
MSD = {
    "name": "x",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "lesion"},
    "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    "test": ["./imagesTs/b.nii.gz"],
}


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize(("original", "end"), [(NNUNET, "_0000"), (MSD, "")], ids=["nnunet", "msd"])
def test_discover__damaged_dataset_json(original, end, examples):
    def body(content, root):
        scan = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4))
        for folder, name in (("imagesTr", f"a{end}"), ("labelsTr", "a"), ("imagesTs", f"b{end}")):
            (root / folder).mkdir()
            nib.save(scan, root / folder / f"{name}.nii.gz")
        write_json(root / "dataset.json", content)
        discover(root)

    check(damaged(original) | values, body, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_load_split__damaged_file(lab, examples):
    def body(content, folder):
        write_json(folder / "s.json", content)
        load_split(folder / "s.json", lab.store)

    lab.split.save(lab.root / "s.json")
    check(damaged(json.loads((lab.root / "s.json").read_text())) | values, body, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["manifest.json", "zarr.json", "complete.json"])
def test_open_store__damaged_description(lab, name, examples):
    def body(content, folder):
        for path in lab.store.path.iterdir():
            if path.name != name:
                (folder / path.name).symlink_to(path)
        write_json(folder / name, content)
        SliceStore.open(folder)

    check(damaged(json.loads((lab.store.path / name).read_text())) | values, body, examples)


HEADER = {
    "__metadata__": {"format": "pt"},
    "image_encoder.pos_embed": {"dtype": "F32", "shape": [1, 2, 2, 1], "data_offsets": [0, 16]},
    "image_encoder.neck.0.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]},
}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_read_weights__damaged_safetensors_header(examples):
    def body(content, folder):
        header = json.dumps(content).encode()
        (folder / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
        read_weights(folder / "w.safetensors")

    check(damaged(HEADER) | values, body, examples)


TAGS = [
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
    "PhotometricInterpretation", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness",
    "InstanceNumber", "SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID", "PatientID", "Modality",
    "RescaleSlope", "RescaleIntercept", "WindowCenter", "NumberOfFrames", "SpecificCharacterSet",
]  # fmt: skip
BYTES = st.sampled_from([b"", b"\0\0", b"1 ", b"-1", b"0\\0", b"1\\2\\3 ", b"nan ", b"1e999 ", b"\xff\xfe", b"MRCT"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, on values that it reads nevertheless
@pytest.mark.parametrize("examples", EXAMPLES)
def test_discover__damaged_dicom_attributes(examples):
    def body(changes, folder):
        paths = write_series(folder, np.arange(60, dtype=np.uint16).reshape(3, 4, 5))
        for tag, raw, every in changes:
            for path in paths if every else paths[:1]:
                dataset = pydicom.dcmread(path, force=True)
                number = pydicom.datadict.tag_for_keyword(tag)
                vr = pydicom.datadict.dictionary_VR(number).split(" ")[0]
                element = RawDataElement(pydicom.tag.Tag(number), vr, len(raw), raw, 0, False, True)
                dataset._dict[pydicom.tag.Tag(number)] = element
                dataset.save_as(path)
        for case in discover(folder).cases:
            read_case(case)

    change = st.tuples(st.sampled_from(TAGS), BYTES | st.binary(max_size=8).map(lambda b: b + b" " * (len(b) % 2)),
                       st.booleans())  # fmt: skip
    check(st.lists(change, min_size=1, max_size=3), body, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_discover__damaged_nifti_header(examples):
    def body(changes, folder):
        nib.save(nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)), folder / "a.nii")
        content = bytearray((folder / "a.nii").read_bytes())
        for place, raw in changes:
            content[place : place + len(raw)] = raw
        (folder / "a.nii").write_bytes(bytes(content))
        for case in discover(folder).cases:
            read_case(case)

    change = st.tuples(st.integers(0, 347), st.binary(min_size=1, max_size=4))
    check(st.lists(change, min_size=1, max_size=4), body, examples)
