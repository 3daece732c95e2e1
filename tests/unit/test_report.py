"""Tests of the single-file HTML reports."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from samgraft.finetune.training.report import next_commands
from samgraft.shared.report import page
from samgraft.shared.report.page import (
    KeyValues,
    Picture,
    RawHtml,
    Section,
    Table,
    Text,
    curve_figure,
    image_grid,
    next_section,
    path_for_report,
    render_report,
    strip_folders,
)

EVIL = '"><script>alert(1)</script>'


def test_render_report__escapes_all_text() -> None:
    parts = [
        Text(text=EVIL),
        Text(text=EVIL, kind="command"),
        KeyValues(items={EVIL: EVIL}),
        Table(columns=[EVIL], rows=[[EVIL]], caption=EVIL),
        Picture(png=b"x", caption=EVIL),
    ]
    html = render_report(EVIL, [Section(title=EVIL, parts=parts)], subtitle=EVIL)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 13


def test_render_report__contains_no_addresses() -> None:
    png = curve_figure({"loss": (range(5), range(5))}, ylabel="loss", baseline=("start", 2.0))
    html = render_report("Run", [Section(title="Curves", parts=[Picture(png=png, caption="Loss.")])])
    assert not re.search(r"https?:", html)
    assert re.findall(r'src="([^"]{0,22})', html) == ["data:image/png;base64,"]
    assert b"tEXt" not in png, "the PNG must not contain metadata"


def test_table__aligns_numbers_and_counts_left_out_rows() -> None:
    rows = [["case", 0.123456, None, float("nan"), 7], ["case", 2e-5, None, 12345.6, 7], ["left out", 1.0, 1.0, 1.0, 1]]
    html = render_report("T", [Section(title="s", parts=[Table(columns=list("abcde"), rows=rows, max_rows=2)])])
    shown = re.findall(r'<td class="n">([^<]*)</td>', html)
    assert shown == ["0.123", "n/a", "7", "2e-05", "12346", "7"]
    assert html.count("n/a</td>") == 3
    assert "1 of 3 rows left out." in html


def test_table__with_thousands_of_rows_stays_small() -> None:
    rows = [[f"case {i}", i / 2000] for i in range(2000)]
    html = render_report("T", [Section(title="s", parts=[Table(columns=["case", "Dice"], rows=rows)])])
    assert len(html) < 100_000


def test_image_grid__shows_each_image_in_its_column() -> None:
    black, white = np.zeros((8, 8)), np.ones((8, 8))
    picture = np.asarray(Image.open(io.BytesIO(image_grid([[black, white]], column_titles=["a", "b"]))).convert("L"))
    row = picture[picture.shape[0] * 2 // 3]
    assert row[len(row) // 4] == 0
    assert row[3 * len(row) // 4] == 255


def test_curve_figure__min_span_and_from_zero_change_the_ordinate() -> None:
    flat = {"dice": (range(3), [0.50, 0.51, 0.50])}
    plain = curve_figure(flat, ylabel="Dice")
    assert curve_figure(flat, ylabel="Dice", min_span=0.001) == plain
    assert curve_figure(flat, ylabel="Dice", min_span=0.2) != plain
    assert curve_figure(flat, ylabel="Dice", from_zero=True) != plain


@pytest.mark.parametrize("values", [[0.037, 0.038], [12.86, 12.868], [0.5, 0.5], [0.0, 0.0]])
def test_curve_figure__from_zero_leaves_space_above_the_highest_value(values, monkeypatch) -> None:
    """Half of a line was cut off at the upper edge when values were nearly constant."""
    drawn: list[Figure] = []
    monkeypatch.setattr(page, "figure_png", lambda figure: drawn.append(figure) or b"")
    curve_figure({"a": ([0, 4], values)}, ylabel="a", baseline=("start", values[0]), from_zero=True)
    bottom, top = drawn[0].axes[0].get_ylim()
    assert bottom == 0
    assert top >= 1.04 * max(values)
    assert top > 0


def test_curve_figure__with_long_tick_labels_shows_the_whole_ordinate_name() -> None:
    """The name was cut off when the first layout changed the ticks and with them the free space."""
    spread = [0.01988176256418228, 0.020064570009708405, 0.01764027588069439, 0.017218083143234253, 0.0170596782118082]
    png = curve_figure(
        {"a": ([0, 20, 40, 60, 80], spread)}, ylabel="feature std", from_zero=True, baseline=("start", spread[0])
    )
    grey_HW = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert (grey_HW[:, 0] == 255).all()
    assert (grey_HW[:, :40] < 128).any()


def test_render_report__navigation_can_wrap_between_sections() -> None:
    html = render_report("t", [Section(title=name, parts=[]) for name in ("One", "Two", "Three")])
    assert re.search(r">One</a>\s+<a [^>]*>Two</a>", html)


def test_path_for_report__absolute_path_loses_its_folders() -> None:
    assert path_for_report("runs/a b") == "runs/a b"
    assert path_for_report("/vol/name/runs/a") == "a"
    line = "No such file: '/vol/name/scans/pat 1.nii', 0.5 s/step, runs/a/tb, https://host/x/y, see /mnt/c/log.txt"
    expected = "No such file: 'pat 1.nii', 0.5 s/step, runs/a/tb, https://host/x/y, see log.txt"
    assert strip_folders(line) == expected


@pytest.mark.parametrize(("runs", "shown"), [("/vol/name/runs", "'a b'"), ("other", "'other/a b'")])
def test_finetune_report__names_the_run_without_its_folders(runs: str, shown: str) -> None:
    sections = next_section(next_commands(path_for_report(Path(runs) / "a b"), ["p_1"], is_good=True))
    text = "\n".join(part.text for section in sections for part in section.parts)
    assert f"RUN={shown} SPLIT=test" in text
    assert f"RUN={shown} OUT='releases/a b'" in text


def test_report__pictures_are_whole_at_500_px_and_scroll_only_on_narrower_screens():
    picture = Picture(png=b"", caption="Stays.")
    html = render_report("Run", [Section(title="One", parts=[picture])])
    assert re.search(r'<div class="scroll"><img [^>]*></div>\s*<figcaption>Stays.</figcaption>', html)
    # 28rem are 448 px, and 468 px are left between the margins of a page of 500 px.
    narrow = html[html.index("@media (max-width: 40rem)") :]
    assert ".scroll img { max-width: none; width: max(100%, 28rem); }" in narrow


def test_report__texts_of_a_table_keep_a_width_and_numbers_are_not_wrapped():
    table = Table(columns=["pair", "p", "class"], rows=[["a-long-name-of-a-run - another", 9.1e-7, "label 1"]])
    html = render_report("Run", [Section(title="One", parts=[table])])
    assert re.search(r'<td class="long">.*<td class="n">.*<td class="short">', html)
    assert "td.n, td.short { white-space: nowrap; }" in html
    assert "td.long { min-width: 9rem; }" in html


def test_next_section__without_commands_is_left_out():
    assert next_section([]) == []


def test_report__captions_stay_when_a_table_is_scrolled_and_long_tables_open_on_request():
    table = Table(columns=["a"], rows=[[1]], caption="Stays.", summary="All tensors")
    page = render_report("Run", [Section(title="One", parts=[table])])
    scrolled = page[page.index('<div class="scroll">') : page.index("</table></div>")]
    assert "Stays." not in scrolled
    assert "<figcaption>Stays.</figcaption>" in page
    assert "<details><summary>All tensors</summary>" in page


def test_report__key_of_a_picture_shows_a_color_per_escaped_name():
    picture = Picture(png=b"x", caption="Masks.", key={"<b>brain": "#ff5a40"})
    page = render_report("Run", [Section(title="One", parts=[picture])])
    assert '<span class="key" style="background:#ff5a40"></span>&lt;b&gt;brain' in page


def test_report__html_of_the_viewer_reaches_the_page():
    page = render_report("Run", [Section(title="One", parts=[RawHtml(html="<canvas></canvas>")])])
    assert "<canvas></canvas>" in page
