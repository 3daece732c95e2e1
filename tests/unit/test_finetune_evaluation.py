"""Tables of evaluations, averages, comparisons, subgroups and post-processing against cases worked out by hand."""

import csv
import dataclasses
import io
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from samgraft.finetune.classes import IGNORE_LABEL, ClassTable
from samgraft.finetune.evaluation.comparison import compare_runs, read_evaluated_run, render_pair, write_comparison
from samgraft.finetune.evaluation.evaluate import Evaluation, PackedLabels, write_evaluation
from samgraft.finetune.evaluation.metrics import class_scores
from samgraft.finetune.evaluation.postprocess import (
    PostProcessing,
    apply_postprocessing,
    choose_postprocessing,
    read_postprocessing,
)
from samgraft.finetune.evaluation.scores import (
    CASE_COLUMNS,
    METRICS,
    case_rows,
    count_one_sided,
    interval_of,
    per_patient,
    read_cases,
    render_csv,
)
from samgraft.finetune.evaluation.statistics import compare_paired, holm, rank_biserial
from samgraft.finetune.evaluation.subgroups import read_subgroups, subgroups_by
from samgraft.shared.errors import DataError, UsageError, WeightsError
from samgraft.shared.store.store import SliceStore
from scipy import stats
from store_factory import make_store

CLASSES = ClassTable(ids=(1, 4), names=("core", "rim"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return SliceStore.open(make_store(tmp_path_factory.mktemp("store"), num_patients=4, series_per_patient=2))


def rows_of(store, change=lambda label, number: label, classes=CLASSES):
    rows = []
    for number, record in enumerate(store.series):
        true = store.read_label_volume(record.series_id)
        rows += case_rows(change(true, number), true, record, classes, tolerance_mm=1.0)
    return rows


def table(values, *, name="core"):
    """Rows of patients p0, p1, ... with one scan each and the given Dice."""
    rows = []
    for number, dice in enumerate(values):
        row = dict.fromkeys(CASE_COLUMNS)
        row |= {"patient_id": f"p{number}", "series_id": f"s{number}", "label_id": 1, "class": name}
        row |= {"true_voxels": 1, "predicted_voxels": 1, "true_ml": 0.1, "predicted_ml": 0.1, "dice": dice}
        rows.append(row)
    return rows


def write_run(folder, rows, **facts):
    values = {"store_fingerprint": "f", "split_sha256": "s", "weights_sha256": "w", **facts}
    out = folder / "evaluation" / "test"
    write_evaluation(Evaluation(part="test", rows=rows, tolerance_mm=1.0), out, provenance=values)
    return folder


def test_class_scores__overlap_worked_out_by_hand():
    predicted = np.array([1, 1, 1, 0, 4, 0])
    true = np.array([1, 1, 0, 1, 0, 0])
    core, rim = class_scores(predicted, true, CLASSES)
    assert core.iou == pytest.approx(2 / 4)
    assert core.sensitivity == pytest.approx(2 / 3)
    assert core.precision == pytest.approx(2 / 3)
    assert core.relative_volume_error == 0
    assert not core.is_one_sided
    assert (rim.iou, rim.sensitivity, rim.precision, rim.relative_volume_error) == (0.0, None, 0.0, None)
    assert rim.is_one_sided
    missed = class_scores(np.zeros(3), np.array([4, 4, 0]), CLASSES)[1]
    assert (missed.sensitivity, missed.precision, missed.relative_volume_error) == (0.0, None, -1.0)


def test_case_rows__perfect_and_missed_scans_have_known_values(store):
    perfect = rows_of(store)
    core = [row for row in perfect if row["class"] == "core"]
    assert all(row["dice"] == row["iou"] == row["nsd"] == row["precision"] == 1 for row in core)
    assert all(row["hd95_mm"] == row["volume_error_ml"] == 0 for row in core)
    # Spacing 5 x 1 x 1 mm: a voxel is 0.005 ml.
    assert all(row["true_ml"] == pytest.approx(row["true_voxels"] * 0.005) for row in core)
    # No scan of the store has the class rim, so nothing can be measured.
    assert all(row[metric.key] is None for row in perfect if row["class"] == "rim" for metric in METRICS)
    missed = rows_of(store, lambda label, number: label * (number > 0))
    assert count_one_sided(missed) == 1
    z, y, x = store.series[0].shape_zyx
    assert missed[0]["hd95_mm"] == pytest.approx(np.linalg.norm([5 * z, y, x]))
    assert missed[0]["volume_error_ml"] == pytest.approx(-missed[0]["true_ml"])


def test_per_patient__scans_are_averaged_within_patients(store):
    """One of eight scans of four patients is missed. Its patient has 1/2 and the mean over patients is 7/8."""
    rows = rows_of(store, lambda label, number: label * (number > 0))
    assert sorted(per_patient(rows, "dice").values()) == [0.5, 1, 1, 1]
    assert interval_of(rows, "dice").mean == pytest.approx(7 / 8)
    assert interval_of(rows, "dice", class_name="rim") is None


def test_interval_of__patient_with_three_scans_counts_once():
    """Three scans of Dice 0.9 and one of 0.1: 0.5 over patients, where the mean over scans would be 0.7."""
    rows = table([0.9, 0.9, 0.9, 0.1])
    for row in rows[:3]:
        row["patient_id"] = "p0"
    assert interval_of(rows, "dice").mean == pytest.approx(0.5)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_render_csv__formula_in_a_text_cell_is_quoted_and_read_back(tmp_path, text):
    """A spreadsheet would run the text. Names of patients, scans and classes come from files."""
    rows = table([0.5], name=text)
    rows[0]["volume_error_ml"] = -0.25
    content = render_csv(rows)
    cells = next(csv.DictReader(io.StringIO(content, newline="")))
    assert cells["class"] == f"'{text}"
    assert cells["volume_error_ml"] == "-0.2500"
    (tmp_path / "cases.csv").write_text(content, newline="")
    assert read_cases(tmp_path / "cases.csv")[0]["class"] == text


def test_write_evaluation__tables_are_read_back_and_reproducible(store, tmp_path):
    rows = rows_of(store, lambda label, number: np.roll(label, number, axis=2))
    evaluation = Evaluation(part="test", rows=rows, tolerance_mm=1.0)
    for name in ("a", "b"):
        write_evaluation(evaluation, tmp_path / name, provenance={}, subgroups=[subgroups_by("plane", store)])
    for name in ("cases.csv", "summary.json", "subgroups.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    back = read_cases(tmp_path / "a" / "cases.csv")
    assert [r["series_id"] for r in back] == [r["series_id"] for r in rows]
    for metric in METRICS:
        assert [r[metric.key] for r in back] == pytest.approx([r[metric.key] for r in rows], abs=1e-4)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert set(summary["metrics"]) == {m.key for m in METRICS}
    assert summary["metrics"]["hd95_mm"]["better"] == "lower"
    assert summary["subgroups"] == {"plane": {"axial": 8}}
    assert render_csv(back) == render_csv(read_cases(tmp_path / "b" / "cases.csv"))


@pytest.mark.parametrize(
    ("content", "text"),
    [("", "columns"), ("a,b\n1,2\n", "columns"), (",".join(CASE_COLUMNS) + "\np,s,x" + ",1" * 14 + "\n", "damaged")],
)
def test_read_cases__damaged_file_is_refused(tmp_path, content, text):
    (tmp_path / "cases.csv").write_text(content)
    with pytest.raises(DataError, match=text):
        read_cases(tmp_path / "cases.csv")
    with pytest.raises(DataError, match="there is none"):
        read_cases(tmp_path / "nothing" / "cases.csv")


def test_packed_labels__are_lossless_and_small():
    labels = np.zeros((20, 64, 64), dtype=np.int32)
    labels[3:9, 10:40, 20:50] = 300
    packed = PackedLabels.pack(labels)
    assert np.array_equal(packed.unpack(), labels)
    assert len(packed.content) < labels.nbytes / 100


# --- statistics -------------------------------------------------------------------------------------------------------


def test_compare_paired__ranks_worked_out_by_hand():
    """Gains of 1 to 5 and a loss of 6 hundredths have rank sums of 15 and 6, of 21."""
    first = np.full(6, 0.2)
    second = first + np.array([0.01, 0.02, 0.03, 0.04, 0.05, -0.06])
    pair = compare_paired(first, second)
    assert pair.difference.mean == pytest.approx(0.09 / 6)
    assert pair.effect.mean == pytest.approx((15 - 6) / 21)
    assert pair.p_value == pytest.approx(stats.wilcoxon(second - first).pvalue)
    assert pair.effect.low < pair.effect.mean < pair.effect.high
    back = compare_paired(second, first)
    assert back.difference.mean == pytest.approx(-pair.difference.mean)
    assert back.effect.mean == pytest.approx(-pair.effect.mean)


def test_compare_paired__equal_models_or_few_patients_give_no_evidence():
    same = compare_paired([0.5] * 8, [0.5] * 8)
    assert (same.p_value, same.effect.mean, same.difference.mean) == (1.0, 0.0, 0.0)
    few = compare_paired([0.1, 0.2], [0.2, 0.3])
    assert few.p_value is None
    assert few.difference.low is None
    assert few.effect.mean == 1.0
    assert compare_paired([], []) is None
    with pytest.raises(ValueError, match="one per patient"):
        compare_paired([0.1], [])
    assert rank_biserial(np.array([1.0, 2.0, 0.0])) == 1.0


def test_holm__corrected_values_worked_out_by_hand():
    """0.01 * 4, 0.02 * 3 and 0.03 * 2 = 0.06, and 0.9: they never fall and are at most 1."""
    corrected = holm([0.02, None, 0.01, 0.9, 0.03])
    assert corrected == [pytest.approx(0.06), None, pytest.approx(0.04), pytest.approx(0.9), pytest.approx(0.06)]
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_compare_runs__three_runs_give_three_corrected_pairs(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.4, 0.6, size=12)
    runs = [
        read_evaluated_run(write_run(tmp_path / name, table(base + gain)), part="test")
        for name, gain in (("a", 0), ("b", rng.uniform(0.1, 0.3, size=12)), ("c", rng.normal(0, 0.1, size=12)))
    ]
    results = {(r["first"], r["second"]): r for r in compare_runs(runs, metrics=["dice"]) if r["class"] == "all"}
    assert set(results) == {("a", "b"), ("a", "c"), ("b", "c")}
    winner = results["a", "b"]
    assert winner["effect"] == 1.0
    assert winner["low"] > 0.1
    # Three tests of three pairs, because the mean over classes is that of the only class.
    assert winner["p_holm"] == pytest.approx(winner["p_wilcoxon"] * 3)
    assert results["a", "c"]["p_holm"] > 0.05
    assert "p (Holm)" in render_pair(winner)
    write_comparison(runs, list(results.values()), tmp_path / "out", metrics=["dice"])
    with (tmp_path / "out" / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["second"] for line in lines] == ["b", "c", "c"]
    assert float(lines[0]["difference"]) == pytest.approx(winner["difference"], abs=1e-4)


def test_compare_runs__several_classes_are_tests_of_their_own(tmp_path):
    dice = [0.1, 0.3, 0.5, 0.7, 0.2, 0.6]
    runs = []
    for name, gain in (("a", 0.0), ("b", 0.1)):
        rows = [*table([d + gain for d in dice]), *table([d + gain + 0.05 for d in dice], name="edge")]
        runs.append(read_evaluated_run(write_run(tmp_path / name, rows), part="test"))
    results = compare_runs(runs, metrics=["dice"])
    assert [row["class"] for row in results] == ["all", "core", "edge"]
    # All gains are equal, so that each of three tests has the smallest p-value of six patients, 2 / 2**6.
    assert [row["p_wilcoxon"] for row in results] == pytest.approx([1 / 32] * 3)
    assert [row["p_holm"] for row in results] == pytest.approx([3 / 32] * 3)


def test_compare_runs__rows_in_another_order_are_paired_by_patient(tmp_path):
    """Every patient gains 0.1. Paired by row, the differences would have both signs."""
    dice = [0.1, 0.3, 0.5, 0.7, 0.2, 0.6]
    first = read_evaluated_run(write_run(tmp_path / "a", table(dice)), part="test")
    second = read_evaluated_run(write_run(tmp_path / "b", table([d + 0.1 for d in dice])[::-1]), part="test")
    result = compare_runs([first, second], metrics=["dice"])[0]
    assert result["difference"] == pytest.approx(0.1)
    assert result["effect"] == 1.0


def test_compare_runs__patient_without_a_value_in_one_run_is_dropped(tmp_path):
    first = read_evaluated_run(write_run(tmp_path / "a", table([None, 0.3, 0.5])), part="test")
    second = read_evaluated_run(write_run(tmp_path / "b", table([0.9, 0.4, 0.6])), part="test")
    result = compare_runs([first, second], metrics=["dice"])[0]
    assert result["difference"] == pytest.approx(0.1)
    assert result["num_patients_dropped"] == 1


@pytest.mark.parametrize("key", ["store_fingerprint", "split_sha256", "surface_tolerance_mm", "precision"])
def test_compare_runs__other_data_or_measure_is_refused(tmp_path, key):
    a, b = (read_evaluated_run(write_run(tmp_path / n, table([0.5, 0.6])), part="test") for n in "ab")
    other = dataclasses.replace(b, summary={**b.summary, key: "other"})
    with pytest.raises(DataError, match=f"{key} of b differs from that of a"):
        compare_runs([a, other])


def test_compare_runs__unequal_evaluations_are_refused(tmp_path):
    a = read_evaluated_run(write_run(tmp_path / "a", table([0.5, 0.6])), part="test")
    with pytest.raises(UsageError, match="two or more runs"):
        compare_runs([a])
    with pytest.raises(UsageError, match="metrics must be among"):
        compare_runs(
            [a, read_evaluated_run(write_run(tmp_path / "b", table([0.5, 0.6])), part="test")], metrics=["dicee"]
        )
    other = read_evaluated_run(write_run(tmp_path / "c", table([0.5, 0.6]), store_fingerprint="g"), part="test")
    with pytest.raises(DataError, match="store_fingerprint of c differs"):
        compare_runs([a, other])
    fewer = read_evaluated_run(write_run(tmp_path / "d", table([0.5])), part="test")
    with pytest.raises(DataError, match="0 are only in d and 1 only in a"):
        compare_runs([a, fewer])
    with pytest.raises(DataError, match="evaluated on val"):
        read_evaluated_run(tmp_path / "a", part="val")
    cases = tmp_path / "a" / "evaluation" / "test" / "cases.csv"
    cases.write_text("".join(cases.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"every scan of the evaluation \(2\), got 1"):
        read_evaluated_run(tmp_path / "a", part="test")


# --- subgroups --------------------------------------------------------------------------------------------------------


def test_subgroups__table_and_store_give_scores_per_group(store, tmp_path):
    patients = store.patient_ids
    path = tmp_path / "scanner.csv"
    path.write_text("patient_id,group\n" + "".join(f"{p},{'AB'[n % 2]}\n" for n, p in enumerate(patients)))
    groups = read_subgroups(path, store, patients=patients)
    missed_patient = patients[0]
    ids = {r.series_id for r in store.series if r.patient_id == missed_patient}
    rows = [row | ({"dice": 0.0} if row["series_id"] in ids else {}) for row in rows_of(store)]
    lines = {(x["group"], x["class"]): x for x in groups.table(rows) if x["metric"] == "dice"}
    assert lines["A", "core"]["mean"] == pytest.approx(0.5)
    assert lines["B", "all"]["mean"] == 1.0
    assert lines["A", "all"]["num_patients"] == 2
    assert groups.counts(rows) == {"A": 4, "B": 4}
    assert groups.attribute == "scanner"
    assert set(subgroups_by("slice_spacing", store).group_of.values()) == {"5.0 mm"}
    with pytest.raises(UsageError, match="by one of site"):
        subgroups_by("hospital", store)
    with pytest.raises(DataError, match="has the site of no scan"):
        subgroups_by("site", store)


@pytest.mark.parametrize(
    ("content", "text"),
    [("patient,group\n", "columns patient_id"), ("patient_id,group\n", "have none"), (None, "does not exist")],
)
def test_read_subgroups__bad_table_is_refused(store, tmp_path, content, text):
    path = tmp_path / "groups.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=text):
        read_subgroups(path, store, patients=store.patient_ids)


def test_read_subgroups__patient_in_two_groups_is_refused(store, tmp_path):
    path = tmp_path / "groups.csv"
    patient = store.patient_ids[0]
    path.write_text(f"patient_id,group\n{patient},A\n{patient},B\n")
    with pytest.raises(DataError, match="line 3: every patient must have one group"):
        read_subgroups(path, store, patients=[patient])


# --- post-processing --------------------------------------------------------------------------------------------------


def make_spotty_labels():
    """Return a block with a hole in its middle slice, a separate voxel and a voxel of another class, and the truth."""
    true = np.zeros((5, 20, 20), dtype=np.int32)
    true[1:4, 2:8, 2:8] = 1
    predicted = true.copy()
    predicted[2, 4:6, 4:6] = 0
    predicted[1, 15, 15] = 1
    predicted[3, 4, 4] = 4
    return predicted, true


def test_apply_postprocessing__steps_worked_out_by_hand():
    predicted, true = make_spotty_labels()
    largest = apply_postprocessing(predicted, {1: ["largest_component"]})
    assert largest[1, 15, 15] == 0
    assert largest[2, 4, 4] == 0
    filled = apply_postprocessing(predicted, {1: ["fill_holes"]})
    assert filled[2, 4, 4] == 1
    assert filled[1, 15, 15] == 1
    assert filled[3, 4, 4] == 4, "filling must not change a voxel of another class"
    both = apply_postprocessing(predicted, {1: ["largest_component", "fill_holes"]})
    assert (both != true).sum() == 1
    assert np.array_equal(apply_postprocessing(predicted, {}), predicted)
    assert predicted[1, 15, 15] == 1, "the input must not change"


def test_choose_postprocessing__steps_need_a_gain_in_enough_patients(tmp_path):
    predicted, true = make_spotty_labels()
    facts = {"weights_sha256": "w", "split_sha256": "s"}
    cases = [(f"p{n}", predicted, true) for n in range(3)]
    chosen = choose_postprocessing(cases, CLASSES, **facts)
    assert chosen.steps == {1: ["largest_component", "fill_holes"]}
    assert chosen.dice[1]["after"] > chosen.dice[1]["before"]
    assert chosen.describe(CLASSES) == "core: largest component, fill holes"
    assert choose_postprocessing(cases[:2], CLASSES, **facts).steps == {}
    two_lesions = true.copy()
    two_lesions[0:2, 12:18, 12:18] = 1
    harmful = [(f"p{n}", two_lesions, two_lesions) for n in range(3)]
    assert choose_postprocessing(harmful, CLASSES, **facts).steps == {}
    chosen.write(tmp_path)
    assert read_postprocessing(tmp_path, weights_sha256="w", classes=CLASSES) == chosen
    with pytest.raises(WeightsError, match="other weights"):
        read_postprocessing(tmp_path, weights_sha256="x", classes=CLASSES)
    with pytest.raises(WeightsError, match="must name steps"):
        read_postprocessing(tmp_path, weights_sha256="w", classes=ClassTable(ids=(7,), names=("z",)))
    (tmp_path / "postprocessing.json").write_text("{")
    with pytest.raises(WeightsError, match="damaged"):
        read_postprocessing(tmp_path, weights_sha256="w", classes=CLASSES)
    assert read_postprocessing(tmp_path / "none", weights_sha256="w", classes=CLASSES) == PostProcessing()


def test_apply_postprocessing__voxels_are_connected_by_faces_in_three_dimensions():
    """A line of 3 touches one of 2 at an edge only, and 4 voxels in a column through the slices are the largest."""
    labels = np.zeros((4, 4, 5), dtype=np.int32)
    labels[0, 0, :3] = 7
    labels[0, 1, 3:5] = 7
    labels[:, 3, 0] = 7
    labels[2, 1, 4] = 2
    found = apply_postprocessing(labels, {7: ["largest_component"]})
    expected = np.zeros_like(labels)
    expected[:, 3, 0] = 7
    expected[2, 1, 4] = 2
    np.testing.assert_array_equal(found, expected)


def test_apply_postprocessing__holes_are_filled_within_a_slice_and_never_over_another_class():
    labels = np.zeros((3, 5, 5), dtype=np.int32)
    labels[1, 1:4, 1:4] = 7
    labels[1, 2, 2] = 0
    labels[2] = labels[1]
    labels[2, 2, 2] = 3
    found = apply_postprocessing(labels, {7: ["fill_holes"]})
    assert found[1, 2, 2] == 7
    assert found[2, 2, 2] == 3
    assert (found == 7).sum() == 9 + 8
    bits = np.where(labels == 7, 4, 0)
    bits[1, 2, 2] = 1
    filled = apply_postprocessing(bits, {4: ["fill_holes"]}, is_overlapping=True)
    assert (filled[1, 2, 2], filled[2, 2, 2], filled[0].sum()) == (5, 4, 0)


def test_case_rows__volume_is_that_of_voxels_with_three_different_sides():
    record = SimpleNamespace(patient_id="p", series_id="s", spacing_mm=(5.0, 0.5, 2.0))
    true = np.zeros((3, 4, 5), dtype=np.int32)
    true[1, :2, :3] = CLASSES.ids[0]
    row = case_rows(np.roll(true, 1, axis=2), true, record, CLASSES, tolerance_mm=1.0)[0]
    assert (row["true_ml"], row["volume_error_ml"]) == (pytest.approx(6 * 0.005), 0)


def piece_with_another(other):
    """Return labels of eight voxels and, if wanted, of four others apart from them."""
    label = np.zeros((4, 8, 8), dtype=np.int32)
    label[:2, :2, :2] = CLASSES.ids[0]
    label[3, 5:7, 5:7] = other
    return label


def test_choose_postprocessing__patients_count_once_and_ignored_voxels_never():
    """Removing the other piece helps in three scans of one patient and harms the two other patients."""
    label_id, facts = CLASSES.ids[0], {"weights_sha256": "w", "split_sha256": "s"}
    both, one = piece_with_another(label_id), piece_with_another(0)
    cases = [("p", both, one)] * 3 + [("q", both, both), ("r", both, both)]
    assert choose_postprocessing(cases, CLASSES, **facts).steps == {}
    assert choose_postprocessing([(str(n), both, one) for n in range(3)], CLASSES, **facts).steps != {}
    ignored = [(str(n), both, piece_with_another(IGNORE_LABEL)) for n in range(3)]
    assert choose_postprocessing(ignored, CLASSES, **facts).steps == {}


def test_choose_postprocessing__has_one_scan_in_memory_at_a_time():
    alive = []

    def cases():
        for number in range(4):
            predicted = piece_with_another(CLASSES.ids[0])
            alive.append(weakref.ref(predicted))
            # The scan before is replaced only when this one arrives.
            assert sum(ref() is not None for ref in alive) <= 2
            yield str(number), predicted, piece_with_another(0)

    assert choose_postprocessing(cases(), CLASSES, weights_sha256="w", split_sha256="s").num_patients == 4
