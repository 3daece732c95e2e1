"""Single-file HTML reports.

A report needs no server and no network. Its content security policy lists the hashes of its own scripts, so that no
other script can run in it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from samgraft.shared.invocation import in_typed_grammar

FIGURE_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#8a929c",
    "axes.labelcolor": "#333b45",
    "xtick.color": "#55606b",
    "ytick.color": "#55606b",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
FIGURE_COLORS = ("#1f5fa8", "#c4572b", "#2f8f5b", "#7b4fa3", "#a67c00", "#5f6b78")
"""Colors that differ for readers with any color vision and in a grey print."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Paragraphs of plain text, separated by empty lines."""

    text: str
    kind: Literal["plain", "good", "warning", "command"] = "plain"


@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """List of names and values."""

    items: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Table with headings, in which numbers are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    max_rows: int = 200
    """Largest number of rows. Further rows are left out and counted, so that a report stays small."""
    sortable: bool = False
    """True to sort by a column when its heading is clicked."""
    summary: str = ""
    """Line that opens the table when it is clicked. Empty shows the table at once."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """PNG image with a caption, which is also its alternative text."""

    png: bytes
    caption: str
    width_px: int | None = None
    key: Mapping[str, str] = field(default_factory=dict)
    """CSS colour by the name of what has it, shown before the caption."""


@dataclass(frozen=True, kw_only=True)
class RawHtml:
    """HTML that is not escaped and must not contain text from outside of this program."""

    html: str


SectionPart = Text | KeyValues | Table | Picture | RawHtml


@dataclass(frozen=True, kw_only=True)
class Section:
    """Titled section of a report."""

    title: str
    parts: Sequence[SectionPart] = field(default_factory=tuple)


def next_section(commands: Sequence[str]) -> list[Section]:
    """Return the last section of a report with the commands to run next, or nothing without any."""
    return [Section(title="Next", parts=[Text(kind="command", text="\n\n".join(commands))])] if commands else []


def render_report(title: str, sections: Sequence[Section], *, subtitle: str = "", scripts: Sequence[str] = ()) -> str:
    """Return a complete HTML page in which all text is escaped.

    Args:
        title: Heading of the page.
        sections: Sections in order.
        subtitle: Line under the heading.
        scripts: JavaScript to run after the page, in order. The script that sorts tables is added if needed.
    """
    scripts = list(scripts)
    if any(isinstance(part, Table) and part.sortable for section in sections for part in section.parts):
        scripts.append((Path(__file__).parent / "sort_tables.js").read_text(encoding="utf-8"))
    # In HTML "</script" ends a script even inside a string. In JavaScript "<\\/script" is the same string.
    scripts = [script.replace("</script", "<\\/script") for script in scripts]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["cell"] = _cell
    environment.filters["script_hash"] = _script_hash
    environment.tests["number"] = _is_number
    template = environment.get_template("report.html.jinja")
    described = [
        {"title": section.title, "anchor": f"s{number}", "parts": [_described(part) for part in section.parts]}
        for number, section in enumerate(sections, start=1)
    ]
    return template.render(title=title, subtitle=subtitle, sections=described, scripts=scripts)


def _described(part: SectionPart) -> tuple[str, SectionPart]:
    """Return a part with the name of its type, and its commands as the user typed them."""
    if isinstance(part, Text):
        part = replace(part, text=in_typed_grammar(part.text))
    return type(part).__name__, part


def curve_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    ylabel: str,
    xlabel: str = "step",
    log_y: bool = False,
    smooth: int = 1,
    baseline: tuple[str, float] | None = None,
    min_span: float = 0.0,
    from_zero: bool = False,
    ticks: Mapping[float, str] | None = None,
    size_in: tuple[float, float] = (7.2, 2.9),
) -> bytes:
    """Draw curves over steps.

    Args:
        curves: (x, y) of each curve by name.
        ylabel: Name of the ordinate with its unit.
        xlabel: Name of the abscissa with its unit.
        log_y: True for a logarithmic ordinate.
        smooth: Length of a running mean drawn over the pale raw curve. 1 draws the raw curve only.
        baseline: Name and value of a dashed reference line.
        min_span: Smallest range of the ordinate in its units, so that noise does not look like a result.
        from_zero: True to begin the ordinate at 0, so that a collapse can be seen.
        ticks: Names of the only ticks on the abscissa by position.
        size_in: Width and height in inches.

    Returns:
        A PNG.
    """
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=size_in, layout="constrained")
        axes = figure.add_subplot()
        if ticks is not None:
            axes.set_xticks(list(ticks), list(ticks.values()))
        for number, (name, (x, y)) in enumerate(curves.items()):
            color = FIGURE_COLORS[number % len(FIGURE_COLORS)]
            raw = np.asarray(y, dtype=float)
            marker = "o" if len(raw) <= 30 else None
            if smooth > 1 and len(raw) > 2 * smooth:
                axes.plot(x, raw, color=color, alpha=0.25, linewidth=0.8)
                axes.plot(x, running_mean(raw, smooth), color=color, label=f"{name} (mean of {smooth})")
            else:
                axes.plot(x, raw, color=color, label=name, marker=marker, markersize=3.5)
        if baseline is not None:
            axes.axhline(baseline[1], color="#55606b", linestyle="--", linewidth=1.1, label=baseline[0])
        if log_y:
            axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high - low < min_span:
            axes.set_ylim((low + high - min_span) / 2, (low + high + min_span) / 2)
        if from_zero:
            # Nearly constant values have hardly a margin above them.
            axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * axes.dataLim.y1))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if len(curves) + (baseline is not None) > 1 or smooth > 1:
            axes.legend(loc="best")
        # The first layout may change the ticks, and with them the space that the name of the ordinate needs.
        figure.draw_without_rendering()
        return figure_png(figure)


def image_grid(
    rows: Sequence[Sequence[npt.NDArray[Any]]], *, column_titles: Sequence[str] = (), cell_in: float = 1.6
) -> bytes:
    """Draw images in rows and columns.

    Args:
        rows: Images (H, W) or (H, W, 3), as floats in [0, 1] or bytes.
        column_titles: Titles above the first row.
        cell_in: Side of one image in inches.

    Returns:
        A PNG.
    """
    num_columns = max(len(row) for row in rows)
    with mpl.rc_context(FIGURE_STYLE):
        size = (num_columns * cell_in, len(rows) * cell_in + (0.4 if column_titles else 0))
        figure = Figure(figsize=size)
        figure.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0.01, hspace=0.01)
        grid = figure.subplots(len(rows), num_columns, squeeze=False)
        for axes_row, row in zip(grid, rows, strict=True):
            for column, axes in enumerate(axes_row):
                axes.axis("off")
                if column < len(row):
                    top = 1.0 if np.asarray(row[column]).dtype.kind == "f" else 255
                    axes.imshow(row[column], cmap="gray", vmin=0, vmax=top, interpolation="nearest")
        for axes, title in zip(grid[0], column_titles, strict=False):
            axes.set_title(title, fontsize=9)
        return figure_png(figure)


def path_for_report(path: Path | str) -> str:
    """Return a relative path unchanged, and the last name of an absolute one."""
    # Reports are published with the results, and the folders above may contain user and project names.
    return Path(path).name if Path(path).is_absolute() else str(path)


def strip_folders(text: str) -> str:
    """Return a text with every absolute path reduced to its last name."""
    return re.sub(r"(?<![\w.:/~-])/(?:[^\s/'\"]+/)+(?=[^\s/'\"])", "", text)


def figure_png(figure: Figure) -> bytes:
    """Return a matplotlib figure as a PNG without metadata."""
    buffer = io.BytesIO()
    # matplotlib would otherwise write its version into the file.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def running_mean(values: npt.NDArray[np.floating], length: int) -> npt.NDArray[np.float64]:
    """Return the centered running mean, with shorter windows at both ends."""
    # Differences of a cumulative sum take one pass for any length.
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    low, high = np.maximum(index - length // 2, 0), np.minimum(index + (length + 1) // 2, len(values))
    mean: npt.NDArray[np.float64] = (total[high] - total[low]) / (high - low)
    return mean


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _script_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, float | np.floating):
        return _decimals(float(value))
    return str(value)


def _decimals(value: float) -> str:
    # A fixed number of decimals keeps a column aligned.
    if math.isnan(value):
        return "n/a"
    if 0 < abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 1e3 else f"{value:.0f}"
