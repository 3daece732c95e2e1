"""Release of a stage-1 run, the encoder alone or with its audited state."""

import json
from collections import Counter

import numpy as np
import pytest
from model_factory import tiny_plain_spec, tiny_vit_t_spec
from release_factory import InThisProcess, finished_encoder
from samgraft.shared.commands.release import _releaser
from samgraft.shared.config import load_config, packaged_config, read_stored_config
from samgraft.shared.errors import DataError, UsageError, WeightsError
from samgraft.shared.release import load_back
from samgraft.shared.release.request import ReleaseRequest
from samgraft.shared.samples.slices import select_slices
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.store.store import SliceStore
from samgraft.shared.weights.load import load_image_encoder
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.export import membership
from samgraft.ssl.export.membership import attack_auc, audit_membership, audit_slices
from samgraft.ssl.export.release import release_encoder
from samgraft.ssl.monitor import held_out
from samgraft.ssl.objectives import ObjectiveLoss
from store_factory import make_store


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load_back.subprocess, "run", InThisProcess(capsys).run)
    store = make_store(tmp_path, num_patients=4, shape_zyx=(3, 40, 36), labelled=False)
    return finished_encoder(tmp_path, store, tiny_vit_t_spec(), image_size=64)


def request(run, **values):
    return ReleaseRequest(**({"run": run, "out": run.parents[1] / "out", "licence": "mit"} | values))


def test_release__contains_the_encoder_alone(run):
    assert _releaser(run) is release_encoder
    released = release_encoder(request(run, formats=("sam",)))
    out = run.parents[1] / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "SHA256SUMS", "card.json", "encoder.pth", "encoder.safetensors",
    ]  # fmt: skip
    assert "ssl_state: left out" in released.left_out[-1]
    card = json.loads((out / "card.json").read_text())
    assert "patient_ids" not in card["data_manifest"]
    assert card["license"] == "mit"
    text = (out / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in text
    assert "0.8123 before, 0.4321 after" in text
    assert "7 steps, 56 slices seen" in text
    encoder, again = load_image_encoder(out)
    assert again.objective == "masked_image"
    assert encoder.image_size == 64


def test_release__plain_encoder_in_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load_back.subprocess, "run", InThisProcess(capsys).run)
    store = make_store(tmp_path, num_patients=4, shape_zyx=(3, 40, 36), labelled=False)
    spec = tiny_plain_spec(depth=2, image_size=96)
    run = finished_encoder(tmp_path, store, spec, image_size=96, method="mae")
    released = release_encoder(request(run, formats=("sam", "transformers")))
    assert {c.path: c.outputs for c in released.checked}["transformers"] == ("embeddings",)
    assert "SamVisionModel" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UsageError, match="there is no adapter"):
        release_encoder(request(run, formats=("peft",), out=tmp_path / "b"))


def test_release__continuable_adds_the_state_and_prints_the_audit(run, monkeypatch):
    monkeypatch.setattr(membership, "NUM_SLICES", 4)
    monkeypatch.setattr(membership, "NUM_MASKS", 1)
    release_encoder(request(run, formats=("sam",), continuable=True))
    out = run.parents[1] / "out"
    assert (out / "ssl_state" / "state.safetensors").is_file()
    text = (out / "README.md").read_text()
    audit = audit_membership(run)
    assert f"against held-out patients **{audit.auc_held_out:.3f}**" in text
    assert f"the other **{audit.auc_control:.3f}**" in text
    assert (audit.num_member_patients, audit.num_held_out_patients) == (3, 1)


def test_release__unknown_file_in_the_state_is_refused(run):
    (run / "ssl_state" / "notes.pkl").write_bytes(b"x")
    with pytest.raises(WeightsError, match="files only"):
        release_encoder(request(run, formats=("sam",), continuable=True))
    assert not (run.parents[1] / "out").exists()


def test_release__damaged_encoder_is_refused(run):
    card = json.loads((run / "encoder" / "card.json").read_text())
    (run / "encoder" / "card.json").write_text(json.dumps(card | {"weights_sha256": "0" * 64}))
    with pytest.raises(WeightsError, match="must be the file that its card describes"):
        release_encoder(request(run))


def test_audit__changed_store_or_missing_state_is_refused(run, tmp_path):
    other = make_store(tmp_path, num_patients=4, shape_zyx=(3, 40, 36), labelled=False, seed=5, name="other.zarr")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("/store.zarr", f"/{other.name}"))
    with pytest.raises(DataError, match="must be that of the run"):
        audit_membership(run)
    (run / "config.yaml").write_text(config)
    (run / "ssl_state" / "state.safetensors").unlink()
    with pytest.raises(WeightsError, match="must contain an ssl_state"):
        audit_membership(run)


@pytest.mark.parametrize(
    ("num_slices", "expected"), [(2, [1, 1]), (3, [1, 1, 1]), (5, [1, 2, 2]), (9, [3, 3, 3]), (50, [3, 3, 3])]
)
def test_audit_slices__are_as_many_as_said_and_of_as_many_patients_as_possible(
    tmp_path, monkeypatch, num_slices, expected
):
    store = SliceStore.open(make_store(tmp_path, num_patients=3, shape_zyx=(3, 40, 36), labelled=False))
    monkeypatch.setattr(membership, "NUM_SLICES", num_slices)
    settings = {"modality": "mri", "data": {"store": "x"}, "model": {"base": "random"}}
    config = load_config(PretrainConfig, layers=[packaged_config("pretrain/masked_image-cpu.yaml"), settings])
    passes = []
    monkeypatch.setattr(held_out, "select_slices", lambda *a, **k: passes.append(1) or select_slices(*a, **k))
    refs = audit_slices(store, store.patient_ids, config)
    assert passes == [1]  # one for every patient would cost the square of their number
    assert len(set(refs)) == len(refs)
    assert sorted(Counter(store.record(ref.series_id).patient_id for ref in refs).values()) == expected


def test_audit__every_group_has_the_masks_of_the_finished_run_and_every_second_member(run, monkeypatch):
    monkeypatch.setattr(membership, "NUM_SLICES", 2)
    calls, groups = [], []
    objective, fingerprint = membership.load_objective(run, config_of_run(run))

    def loss(images, *, sample_counters, step, planes):
        calls.append((tuple(sample_counters), step, tuple(planes)))
        return ObjectiveLoss(total=images.mean(), parts={}, features_BC=None)

    def slices_of(store, patients, config):
        groups.append(list(patients))
        return audit_slices(store, patients, config)

    monkeypatch.setattr(objective, "loss", loss)
    monkeypatch.setattr(membership, "load_objective", lambda *_: (objective, fingerprint))
    monkeypatch.setattr(membership, "audit_slices", slices_of)
    audit_membership(run)
    masks = tuple(range(membership.AUDIT_COUNTER, membership.AUDIT_COUNTER + membership.NUM_MASKS))
    steps = config_of_run(run).trainer.max_steps
    assert steps > 0
    assert set(calls) == {(masks, steps, (Plane.AXIAL,) * len(masks))}
    train = sorted(groups[0] + groups[1])
    assert groups[:2] == [train[0::2], train[1::2]]
    assert not set(groups[2]) & set(train)


def config_of_run(run):
    return load_config(PretrainConfig, layers=[read_stored_config(run / "config.yaml")])


def test_attack_auc__equals_a_calculation_by_hand():
    members, others = np.array([1.0, 2.0]), np.array([2.0, 3.0])
    assert attack_auc(members, others) == (0.5 + 1 + 1 + 1) / 4
    assert attack_auc(np.array([0.0]), np.array([1.0, 2.0])) == 1.0
    assert attack_auc(np.array([5.0]), np.array([1.0, 2.0])) == 0.0
    with pytest.raises(UsageError, match="one group has none"):
        attack_auc(members, np.array([]))
