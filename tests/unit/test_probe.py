"""Linear probe and box-prompt check, on known features and on real stores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_factory import make_sam, tiny_hiera_spec, tiny_vit_t_spec
from samgraft.shared.config import load_config
from samgraft.shared.encoders.sam import to_pixels
from samgraft.shared.errors import DataError, UsageError, WeightsError
from samgraft.shared.samples.frame import fit_frame
from samgraft.shared.samples.split import Split, default_split_path
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.preflight import SavedBytes, describe_memory, free_bytes, training_bytes
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_encoder, save_sam
from samgraft.ssl.config import ModelConfig, PretrainConfig, ProbeConfig
from samgraft.ssl.monitor import box_prompt_check
from samgraft.ssl.monitor.labelled import LabelledSlices, ProbeData, labelled_refs, load_probe, open_probe_store
from samgraft.ssl.monitor.linear_probe import (
    DiceCount,
    best_threshold,
    class_shares,
    fit_head,
    probe_dice,
    to_label_ids,
)
from samgraft.ssl.preflight import check_leaks
from store_factory import make_store
from tiny_encoders import tiny_encoder

CPU = torch.device("cpu")
SIZE = 32


class GreyEncoder(torch.nn.Module):
    """Encoder whose features are the grey value of each cell and channels of noise."""

    stride = 4

    def __init__(self, *, blind: bool = False) -> None:
        super().__init__()
        self.spec = replace(tiny_vit_t_spec())
        self.blind = blind
        self.neck = torch.nn.Identity()

    def high_res_layers(self) -> list[torch.nn.Module]:
        return []

    def forward_features(self, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        grey_B1hw = torch.nn.functional.avg_pool2d(pixels_B3SS[:, :1], self.stride)
        noise = torch.rand(1, 3, *grey_B1hw.shape[-2:], generator=torch.Generator().manual_seed(1))
        return torch.cat([0 * grey_B1hw if self.blind else grey_B1hw, noise.expand(len(grey_B1hw), -1, -1, -1)], 1)


def square(row: int, column: int, *, patient: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    label_HW = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    label_HW[row : row + 8, column : column + 8] = 3
    return (0.2 + 0.6 * (label_HW > 0))[None].float(), label_HW, patient


def slices(*items: tuple[torch.Tensor, torch.Tensor, str]) -> LabelledSlices:
    frame = fit_frame((SIZE, SIZE), image_size=SIZE, keep_aspect=True)
    return LabelledSlices(
        images_N1SS=torch.stack([image for image, _, _ in items]),
        labels=tuple(label for _, label, _ in items),
        frames=(frame,) * len(items),
        patient_ids=tuple(patient for _, _, patient in items),
    )


def data() -> ProbeData:
    return ProbeData(
        train=slices(square(4, 8, patient="a"), square(16, 0, patient="b")),
        test=slices(square(8, 20, patient="c"), square(0, 4, patient="c"), square(20, 12, patient="d")),
        class_ids=(3,),
        class_names=("square",),
        store_name="s.zarr",
    )


def test_probe_dice__is_high_only_for_features_with_the_label() -> None:
    seeing = probe_dice(GreyEncoder(), data(), ridge=0.01, batch_size=2, device=CPU)
    blind = probe_dice(GreyEncoder(blind=True), data(), ridge=0.01, batch_size=2, device=CPU)
    assert seeing > 0.9
    assert blind < 0.4


def test_probe_dice__is_the_same_in_every_round_and_batch_size() -> None:
    encoder = tiny_encoder().eval()
    first = probe_dice(encoder, data(), ridge=0.01, batch_size=1, device=CPU)
    assert probe_dice(encoder, data(), ridge=0.01, batch_size=1, device=CPU) == first
    assert probe_dice(encoder, data(), ridge=0.01, batch_size=3, device=CPU) == pytest.approx(first, abs=0.02)


def test_probe_dice__changes_no_weights_and_no_random_state() -> None:
    encoder = tiny_encoder()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    generators = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    probe_dice(encoder.eval(), data(), ridge=0.01, batch_size=2, device=CPU)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], generators[1])


def test_fit_head__finds_a_linear_rule_and_ignores_a_constant_channel() -> None:
    features = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    features[:, 3] = 5.0
    shares = ((features[:, :1] - 2 * features[:, 1:2]) > 0.5).float()
    head = fit_head(features, shares, ridge=1e-3)
    found = head.scores(features.T[None, :, :, None])[0, 0, :, 0] > 0
    assert float((found == (shares[:, 0] > 0)).float().mean()) > 0.95
    assert head.weight_KC[0, 3] == 0


def test_fit_head__ridge_makes_the_weights_smaller() -> None:
    features = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    shares = (features[:, :1] > 0).float()
    free, held = (fit_head(features, shares, ridge=ridge).weight_KC[0, 0] for ridge in (1e-6, 1.0))
    # The features have variance 1, so that a ridge of 1 halves the weight.
    assert float(held / free) == pytest.approx(0.5, abs=0.05)


def test_probe_dice__slices_count_for_their_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    patients = []
    add = DiceCount.add
    monkeypatch.setattr(DiceCount, "add", lambda self, patient, *a: patients.append(patient) or add(self, patient, *a))
    probe_dice(GreyEncoder(), data(), ridge=0.01, batch_size=2, device=CPU)
    assert patients == ["c", "c", "d"]


def test_best_threshold__equals_the_best_of_all_thresholds() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, shares = torch.rand(50, generator=generator), (torch.rand(50, generator=generator) > 0.7).float()

    def dice(threshold: float) -> float:
        chosen = scores > threshold
        return float(2 * shares[chosen].sum() / (chosen.sum() + shares.sum()))

    best = max(dice(float(score) - 1e-6) for score in scores)
    assert dice(float(best_threshold(scores, shares))) == pytest.approx(best)


def test_class_shares__padding_is_outside() -> None:
    frame = fit_frame((SIZE, SIZE // 2), image_size=SIZE, keep_aspect=True)
    label_HW = torch.zeros(SIZE, SIZE // 2, dtype=torch.int64)
    label_HW[0:2, 0:4] = 3
    part = LabelledSlices(
        images_N1SS=torch.zeros(1, 1, SIZE, SIZE), labels=(label_HW,), frames=(frame,), patient_ids=("a",)
    )
    shares, inside = class_shares(part, (3,), stride=4)
    assert shares[0, 0, 0, 0] == 0.5
    assert shares.sum() == 0.5
    assert inside[0].sum() == 8 * 4


def test_dice_count__is_a_mean_over_classes_and_patients() -> None:
    label = torch.tensor([[1, 1, 2, 0]])
    count = DiceCount((1, 2))
    count.add("a", torch.tensor([[1, 0, 2, 0]]), label)  # 2/3 and 1
    count.add("b", torch.tensor([[1, 0, 0, 0]]), torch.tensor([[1, 0, 0, 0]]))  # class 2 is in neither
    assert count.dice() == pytest.approx(((2 / 3 + 1) / 2 + 1) / 2)


def test_dice_count__ignored_pixels_count_nowhere() -> None:
    count = DiceCount((1,))
    count.add("a", torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1, IGNORE_LABEL, IGNORE_LABEL, 1]]))
    assert count.dice() == pytest.approx(2 / 3)


def test_to_label_ids__without_a_positive_score_is_background() -> None:
    frame = fit_frame((2, 2), image_size=2, keep_aspect=True)
    scores = torch.tensor([[[1.0, -1.0], [0.5, -2.0]], [[0.0, -3.0], [0.7, 0.1]]])
    assert to_label_ids(scores, frame, (4, 9)).tolist() == [[4, 0], [9, 9]]


# the store


def config_of(tmp_path, **probe: object) -> PretrainConfig:
    return load_config(
        PretrainConfig,
        layers=[
            {
                "modality": "mri",
                "data": {"store": "unused.zarr"},
                "model": {"base": "random", "image_size": SIZE},
                "objective": {"name": "masked_image"},
                "trainer": {"max_steps": 1},
                "probe": {"store": str(tmp_path / "labelled.zarr"), **probe},
            }
        ],
    )


def make_split_file(store: SliceStore, path, *, train: int = 2, val: int = 1) -> Split:
    ids = store.patient_ids
    parts = {"train": ids[:train], "val": ids[train : train + val], "test": ids[train + val :]}
    split = Split(**parts, seed=0, store_fingerprint=store.fingerprint)
    split.save(path)
    return split


def test_load_probe__train_and_test_have_different_patients(tmp_path) -> None:
    store = SliceStore.open(make_store(tmp_path, num_patients=4, shape_zyx=(6, 24, 20), name="labelled.zarr"))
    split = make_split_file(store, tmp_path / "s.json")
    config = config_of(tmp_path, split=str(tmp_path / "s.json"), num_train_slices=5, num_test_slices=3)
    probe = load_probe(open_probe_store(config.probe), config, preset=load_preset("mri"))
    assert probe is not None
    assert set(probe.train.patient_ids) == set(split.train)
    assert set(probe.test.patient_ids) == set(split.val)
    assert (len(probe.train), len(probe.test)) == (5, 3)
    assert probe.describe() == (
        "lesion of labelled.zarr: fitted on 5 slices of 2 patients, scored on 3 slices of 1 patient"
    )
    assert all(bool((label > 0).any()) for label in (*probe.train.labels, *probe.test.labels))


def test_load_probe__pixels_that_are_not_annotated_are_no_class(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SliceStore.open(make_store(tmp_path, num_patients=3, shape_zyx=(4, 24, 20), name="labelled.zarr"))
    make_split_file(store, tmp_path / "s.json")
    config = config_of(tmp_path, split=str(tmp_path / "s.json"))
    read = SliceStore.read_label_slice

    def read_partly_annotated(self: SliceStore, *arguments: object, **options: object) -> object:
        label_HW = read(self, *arguments, **options).astype("int16")  # type: ignore[arg-type]
        label_HW[:, :5] = IGNORE_LABEL
        return label_HW

    monkeypatch.setattr(SliceStore, "read_label_slice", read_partly_annotated)
    probe = load_probe(open_probe_store(config.probe), config, preset=load_preset("mri"))
    assert probe is not None
    assert probe.class_ids == (1,)
    assert all(bool((label == IGNORE_LABEL).any()) for label in probe.train.labels)


def test_load_probe__split_without_scored_patients_is_refused(tmp_path) -> None:
    store = SliceStore.open(make_store(tmp_path, num_patients=2, shape_zyx=(4, 20, 20), name="labelled.zarr"))
    make_split_file(store, tmp_path / "s.json", train=2, val=0)
    config = config_of(tmp_path, split=str(tmp_path / "s.json"))
    with pytest.raises(DataError, match="the val part of the probe's split must contain labelled slices, got none"):
        load_probe(open_probe_store(config.probe), config, preset=load_preset("mri"))


def test_labelled_refs__are_spread_evenly_over_patients(tmp_path) -> None:
    store = SliceStore.open(make_store(tmp_path, num_patients=3, shape_zyx=(6, 20, 20)))
    refs = labelled_refs(store, store.patient_ids, 7)
    per_patient = [sum(store.record(r.series_id).patient_id == p for r in refs) for p in store.patient_ids]
    assert per_patient == [3, 2, 2]
    assert len(set(refs)) == 7


def test_check_leaks__scored_patients_of_the_probe_are_refused(tmp_path) -> None:
    store = SliceStore.open(make_store(tmp_path, num_patients=4, shape_zyx=(4, 20, 20), name="labelled.zarr"))
    split = make_split_file(store, tmp_path / "s.json")
    config = config_of(tmp_path, split=str(tmp_path / "s.json"))
    opened = open_probe_store(config.probe)
    with pytest.raises(DataError, match="1 val patient was in the pretraining set") as refusal:
        check_leaks(config.data, store, store.patient_ids, probe=opened)
    assert "(probe)" in str(refusal.value.where)
    assert check_leaks(config.data, store, split.train, probe=opened) == [
        "no val or test patient of labelled.zarr (probe) among the training slices"
    ]
    make_split_file(store, default_split_path(store.path))
    both = replace(config.data, test_stores=[str(store.path)])
    assert check_leaks(both, store, split.train, probe=opened) == [
        "no val or test patient of labelled.zarr (test and probe) among the training slices"
    ]
    other = make_split_file(store, default_split_path(store.path), train=1)
    assert check_leaks(both, store, other.train, probe=opened) == [
        "no val or test patient of labelled.zarr, labelled.zarr (probe) among the training slices"
    ]
    allowed = replace(config.data, allow_transductive=True)
    assert "transductive" in check_leaks(allowed, store, store.patient_ids, probe=opened)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, r"probe\.every_n_steps must be at least 1, got 0"),
        ({"ridge": 0.0}, r"probe\.ridge must be greater than 0"),
        ({"num_boxes": -1}, r"probe\.num_boxes must be at least 0"),
        ({"store": None, "split": "split.json"}, "would be ignored without probe.store"),
    ],
)
def test_config__bad_setting_is_refused(tmp_path, settings, message) -> None:
    with pytest.raises(UsageError, match=message):
        config_of(tmp_path, **settings)


# the box-prompt check


def test_tight_box__is_scaled_to_the_input() -> None:
    label_HW = torch.zeros(10, 20, dtype=torch.int64)
    label_HW[2:5, 6:10] = 1
    label_HW[2, 6] = 0
    box = box_prompt_check.tight_box(label_HW, 0, 1)
    assert box is not None
    assert box.native_xyxy == (6, 2, 10, 5)
    assert box.in_frame(fit_frame((10, 20), image_size=40, keep_aspect=True)) == (12, 4, 20, 10)
    assert box.filled_dice(label_HW) == pytest.approx(2 * 11 / (11 + 12))
    assert box_prompt_check.tight_box(label_HW, 0, 2) is None


def test_box_prompt_check__mask_that_fills_the_box_has_the_dice_of_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = data()
    boxes = box_prompt_check.choose_boxes(probe.test, (3,), 8)

    def fill(sam, embeddings, boxes_B4, *, multimask):
        logits = torch.full((len(boxes_B4), 1, SIZE, SIZE), -1.0)
        for mask, (x0, y0, x1, y1) in zip(logits, boxes_B4.int().tolist(), strict=True):
            mask[0, y0:y1, x0:x1] = 1.0
        return logits, None

    monkeypatch.setattr(box_prompt_check, "decode_boxes", fill)
    check = box_prompt_check.BoxPromptCheck(torch.nn.Identity(), probe.test, boxes)
    probe_dice(
        GreyEncoder(), probe, ridge=0.01, batch_size=2, device=CPU,
        on_features=lambda first, features: check.add(GreyEncoder(), first, features),
    )  # fmt: skip
    assert len(boxes) == 3
    assert check.mean_dice() == pytest.approx(check.filled_box_dice) == 1.0


def test_box_prompt_check__equals_sams_own_decoder(tmp_path) -> None:
    sam = make_sam(tiny_vit_t_spec(), image_size=SIZE)
    save_sam(sam, tmp_path / "sam.safetensors")
    model = ModelConfig(base=str(tmp_path / "sam.safetensors"), image_size=SIZE)
    probe = data()
    before = torch.get_rng_state()
    check, note = box_prompt_check.load_box_prompt_check(probe, ProbeConfig(store="s", num_boxes=8), model, stride=4)
    assert torch.equal(before, torch.get_rng_state())
    assert check is not None
    assert note.startswith("3 boxes, decoder of sam.safetensors; Dice of the filled boxes 1.000")
    features = sam.image_encoder.forward_features(probe.test.images_N1SS.repeat(1, 3, 1, 1)).detach()
    check.start_round()
    check.add(sam.image_encoder, 0, features)
    expected = []
    for n, label in enumerate(probe.test.labels):
        rows, columns = torch.where(label == 3)
        corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        sparse, dense = sam.prompt_encoder(points=None, boxes=torch.tensor([corners]).float(), masks=None)
        low, _ = sam.mask_decoder(
            image_embeddings=sam.image_encoder.neck(features[n : n + 1]),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        predicted = (
            torch.nn.functional.interpolate(low, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0] > 0
        )
        expected.append(2 * float((predicted & (label == 3)).sum()) / float(predicted.sum() + (label == 3).sum()))
    assert check.mean_dice() == pytest.approx(sum(expected) / 3)


def test_box_prompt_check__sam2_decoder_reads_the_finer_maps(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps of the present encoder, not of the file's."""
    spec = tiny_hiera_spec()
    save_sam(make_sam(spec, image_size=SIZE), tmp_path / "sam2.safetensors")
    model = ModelConfig(arch="sam2_t", base=str(tmp_path / "sam2.safetensors"), image_size=SIZE)
    probe = data()
    check, _ = box_prompt_check.load_box_prompt_check(probe, ProbeConfig(store="s", num_boxes=8), model, stride=16)
    encoder = make_sam(spec, image_size=SIZE, seed=1).image_encoder
    read, decode = [], box_prompt_check.decode_boxes

    def reading(sam, features, boxes_B4, *, multimask):
        read.append(features)
        return decode(sam, features, boxes_B4, multimask=multimask)

    monkeypatch.setattr(box_prompt_check, "decode_boxes", reading)
    pixels = to_pixels(probe.test.images_N1SS, spec)
    with torch.no_grad():
        check.start_round()
        check.add(encoder, 0, encoder.forward_features(pixels))
        expected = encoder.forward_with_high_res(pixels)
    assert 0 <= check.mean_dice() <= 1
    torch.testing.assert_close(read[0].embeddings, expected.embeddings)
    assert len(read[0].high_res) == 2
    for found, wanted in zip(
        read[0].high_res, check.decoder.mask_decoder.project_high_res(expected.high_res), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_box_prompt_check__without_a_decoder_is_off_or_refused(tmp_path) -> None:
    probe, config = data(), ProbeConfig(store="s")
    card = Card(arch="vit_t", stem="conv1x1", image_size=SIZE, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3)
    save_encoder(tiny_encoder(), tmp_path / "encoder", card)
    model = ModelConfig(base=str(tmp_path / "encoder"), image_size=SIZE)
    load = box_prompt_check.load_box_prompt_check
    assert load(probe, config, model, stride=4) == (
        None, "off, because encoder.safetensors has no decoder (pass it as CKPT, and a full SAM as BASE)",
    )  # fmt: skip
    with pytest.raises(WeightsError, match="BASE must be a full SAM"):
        load(probe, config, replace(model, ckpt=str(tmp_path / "encoder")), stride=4)
    save_sam(make_sam(tiny_vit_t_spec(), image_size=SIZE), tmp_path / "sam.safetensors")
    with_base = replace(model, ckpt=str(tmp_path / "encoder"), base=str(tmp_path / "sam.safetensors"))
    with pytest.raises(UsageError, match="must have the encoder's stride 16"):
        load(probe, config, with_base, stride=16)
    assert load(probe, config, with_base, stride=4)[1].startswith("3 boxes, decoder of sam.safetensors")
    assert load(None, config, model, stride=4)[0] is None
    assert "weights are random" in load(probe, config, replace(model, base="random"), stride=4)[1]


# memory of the pre-flight


def test_saved_bytes__what_the_backward_pass_needs_without_the_weights() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Sigmoid())
    saved = SavedBytes(module)
    inputs = torch.rand(4, 8)
    with saved.count():
        module(inputs)
    assert saved.total == 4 * (4 * 8 + 4 * 16)  # input of the first, output of the second
    assert training_bytes(module, saved.total) == 4 * (4 * 8 * 16) + saved.total


def test_free_bytes__a_job_has_no_more_than_it_was_granted(monkeypatch) -> None:
    whole = free_bytes(torch.device("cpu"))
    assert whole is not None
    assert whole > 2**20
    monkeypatch.setattr("samgraft.shared.training.preflight.granted_memory", lambda: (2**30, 2**20))
    assert free_bytes(torch.device("cpu")) == 2**20


def test_describe_memory__says_when_it_does_not_fit() -> None:
    assert describe_memory(2**30, 2**31, batch_size=4) == (
        "about 1.0 GiB for weights, gradients, AdamW and the activations of 4 slices; 2.0 GiB free", True,
    )  # fmt: skip
    assert not describe_memory(2**30, 2**30, batch_size=4)[1]
