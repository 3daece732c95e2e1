"""The evaluation report in a real browser, from file://: pixels, sorting, the viewer, no complaint, no request."""

import numpy as np
import pytest
from browser import CHROMIUM, open_page
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.evaluation.evaluate import Evaluation, PackedLabels
from samgraft.finetune.evaluation.evaluation_report import NO_PICTURES, NO_VIEWER, Pictured, write_evaluation_report
from samgraft.finetune.evaluation.scores import case_rows
from samgraft.finetune.evaluation.viewer import find_bundle
from samgraft.shared.store.store import SliceStore
from store_factory import make_store

EVIL = '"><script>alert(1)</script>'
CLASSES = ClassTable(ids=(1,), names=(EVIL,))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Five patients whose predictions are shifted by 0 to 4 pixels: the first is best, the last worst."""
    store = SliceStore.open(make_store(tmp_path_factory.mktemp("store"), num_patients=5, shape_zyx=(12, 48, 48)))
    rows, predictions = [], {}
    for number, record in enumerate(store.series):
        true = store.read_label_volume(record.series_id)
        predicted = np.roll(true, number, axis=2)
        rows += case_rows(predicted, true, record, CLASSES, tolerance_mm=2.0)
        predictions[record.series_id] = PackedLabels.pack(predicted)
    evaluation = Evaluation(part="test", rows=rows, tolerance_mm=2.0, predictions=predictions)
    return store, evaluation


def write(evaluated, folder, *, pictures):
    store, evaluation = evaluated
    folder.mkdir(exist_ok=True)
    pictured = Pictured(store=store, intensity=store.intensity, classes=CLASSES) if pictures else None
    return write_evaluation_report(evaluation, folder, title=EVIL, provenance={"weights": EVIL}, pictured=pictured)


def test_report__escapes_and_shows_no_patient_unasked(evaluated, tmp_path):
    page = write(evaluated, tmp_path, pictures=False).read_text()
    assert "<script>alert" not in page
    assert NO_PICTURES in page
    assert "http:" not in page
    assert "https:" not in page
    # The only picture is the plot of scores.
    assert page.count("<img") == 1


def test_report__without_the_viewer_says_so(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr("samgraft.finetune.evaluation.viewer.VENDOR_FOLDER", tmp_path / "nothing")
    # The cache of a checkout may contain the archive, from which the viewer would be unpacked.
    monkeypatch.setenv("SAMGRAFT_CACHE", str(tmp_path / "cache"))
    page = write(evaluated, tmp_path, pictures=True).read_text()
    assert NO_VIEWER in page
    assert page.count("<img") == 4
    assert "<canvas" not in page


def test_bundle__that_is_not_the_pinned_one_is_not_used(tmp_path, monkeypatch, caplog):
    (tmp_path / "niivue.umd.js").write_text("alert(1)")
    monkeypatch.setattr("samgraft.finetune.evaluation.viewer.VENDOR_FOLDER", tmp_path)
    assert find_bundle() is None
    assert "not the pinned niivue" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)")
@pytest.mark.skipif(find_bundle() is None, reason="niivue is not there (make install fetches it)")
def test_report__in_a_browser(evaluated, tmp_path):
    path = write(evaluated, tmp_path, pictures=True)
    with open_page(path, tmp_path / "profile") as page:
        page.wait_for("document.getElementById('viewer').dataset.state === 'ready'")
        column = "[...document.querySelectorAll('table.sortable tbody tr')].map(r => Number(r.cells[3].textContent))"
        worst_first = page.evaluate(column)
        assert worst_first == sorted(worst_first)
        page.evaluate("document.querySelectorAll('table.sortable th button')[3].click()")
        page.evaluate("document.querySelectorAll('table.sortable th button')[3].click()")
        assert page.evaluate(column) == sorted(worst_first, reverse=True)
        assert page.evaluate("document.querySelectorAll('th')[0].textContent") != ""

        page.evaluate("document.getElementById('viewer').scrollIntoView()")
        box = page.evaluate(
            "(r => [r.x, r.y, r.width, r.height])(document.querySelector('canvas').getBoundingClientRect())"
        )
        x, y, width, height = (int(v) for v in box)
        worst = page.screenshot(tmp_path / "worst.png")[y : y + height, x : x + width].astype(int)
        assert (worst.max(axis=2) < 60).mean() > 0.05, "air of the scan is dark"
        green, blue, red = (colored(worst, rgb) for rgb in ((47, 143, 91), (31, 95, 168), (196, 87, 43)))
        assert min(green, blue, red) > 100, (green, blue, red)

        page.evaluate(
            "(s => { s.selectedIndex = s.options.length - 1; s.dispatchEvent(new Event('change')); })"
            "(document.querySelector('#viewer select'))"
        )
        page.wait_for("document.getElementById('viewer').dataset.state === 'loading'")
        page.wait_for("document.getElementById('viewer').dataset.state === 'ready'")
        best = page.screenshot(tmp_path / "best.png")[y : y + height, x : x + width].astype(int)
        assert colored(best, (47, 143, 91)) > green
        assert colored(best, (31, 95, 168)) < blue / 4, "the best case misses nothing"
        assert page.errors == []
        assert [address for address in page.requests if not address.startswith(("file:", "data:", "blob:"))] == []
        assert page.evaluate("document.title").startswith('"><script>')


def colored(pixels, rgb) -> int:
    """Count pixels whose hue is that of a mark, however much grey shines through."""
    strong = pixels.max(axis=2) - pixels.min(axis=2) > 40
    unit = pixels - pixels.mean(axis=2, keepdims=True)
    wanted = np.asarray(rgb) - np.mean(rgb)
    cosine = (unit @ wanted) / (np.linalg.norm(unit, axis=2) * np.linalg.norm(wanted) + 1e-9)
    return int((strong & (cosine > 0.95)).sum())
