"""One session in napari: open a scan, segment it, prompt it, correct it, save it.

Run as a program, in a display: napari_session.py RUN SCAN FOLDER. It prints what the test checks as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def display() -> Iterator[dict[str, str]]:
    """The environment of a program with windows: this one's, or a screen in memory."""
    if os.environ.get("DISPLAY"):
        yield dict(os.environ)
        return
    receive, send = os.pipe()
    words = ["Xvfb", "-displayfd", str(send), "-screen", "0", "1600x1200x24", "-nolisten", "tcp"]
    server = subprocess.Popen(words, pass_fds=[send], stderr=subprocess.DEVNULL)
    os.close(send)
    try:
        with os.fdopen(receive) as file:
            yield {**os.environ, "DISPLAY": f":{file.readline().strip()}"}
    finally:
        server.terminate()
        server.wait()


def has_display() -> bool:
    return bool(os.environ.get("DISPLAY")) or shutil.which("Xvfb") is not None


def session(run: Path, scan: Path, folder: Path) -> dict[str, object]:
    import napari
    from qtpy.QtWidgets import QApplication

    viewer = napari.Viewer(show=False)
    [image] = viewer.open(str(scan), plugin="samgraft")
    _, widget = viewer.window.add_plugin_dock_widget("samgraft", "Segment a scan")
    widget.model.value = run

    def wait(worker) -> None:
        assert worker is not None
        is_done = []
        worker.finished.connect(lambda: is_done.append(True))
        while not is_done:
            QApplication.processEvents()

    wait(widget.segment())
    automatic = viewer.layers[-1]
    np.save(folder / "automatic.npy", automatic.data)

    widget.add_prompt_layers()
    boxes, points = viewer.layers["boxes"], viewer.layers["points"]
    middle = 2
    corners = [(5, 6), (5, 20), (24, 20), (24, 6)]
    boxes.add_rectangles(np.array([image.data_to_world([middle, *corner]) for corner in corners]))
    points.add(image.data_to_world([middle, 15, 12]))
    widget.inside.value = "no"
    points.add(image.data_to_world([middle, 3, 3]))
    widget.mode.value = "slices with a box or points"
    wait(widget.segment())
    prompted = viewer.layers[-1]
    np.save(folder / "prompted.npy", prompted.data)
    viewer.screenshot(str(folder / "window.png"), canvas_only=False, flash=False)

    automatic.data[0, 0, 0] = 1
    automatic.save(str(folder / "corrected.nii.gz"), plugin="samgraft")
    values = {
        "placed": [np.array_equal(getattr(image, name), getattr(automatic, name)) for name in ("scale", "translate")],
        "classes": automatic.features["class"].tolist(),
        "boxes": boxes.features.to_dict("list"),
        "points": points.features.to_dict("list"),
        "num_layers": len(viewer.layers),
    }
    # A stop before the first slice leaves no layer.
    widget.mode.value = "every slice"
    worker = widget.segment()
    widget.stop_requested.set()
    wait(worker)
    values["num_layers_after_stop"] = len(viewer.layers)
    viewer.close()
    return values


if __name__ == "__main__":
    print(json.dumps(session(*map(Path, sys.argv[1:]))))
