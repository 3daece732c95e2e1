"""Dock widget that segments an image layer with a run or release.

It is the only module that imports napari, and nothing imports it but napari.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from magicgui.widgets import ComboBox, Container, FileEdit, LineEdit, ProgressBar, PushButton, create_widget
from napari.layers import Points, Shapes
from napari.qt.threading import create_worker
from napari.utils.notifications import show_info, show_warning
from samgraft.finetune.model_folder import CARD_FILE, read_task
from samgraft.finetune.napari_plugin.layer_prompts import CLASS, INSIDE, NO, YES, prompts_of_layers
from samgraft.finetune.napari_plugin.scan_layers import LayerData, LayerScan, scan_of_layer, segmentation_layers
from samgraft.finetune.prediction.loaded_model import Segmentation, segment_scan
from samgraft.finetune.prediction.predictor import Predictor
from samgraft.finetune.prompting.prompt_file import PromptFile
from samgraft.shared.errors import SamgraftError, UsageError
from samgraft.shared.invocation import called_from_python
from samgraft.shared.weights.card import Card
from superqt.utils import ensure_main_thread

AUTOMATIC, PROMPTED = "every slice", "slices with a box or points"
PLACEMENT = ("scale", "translate", "rotate", "shear", "affine", "units")
"""Attributes that place a layer in the viewer."""


class SegmentWidget(Container):
    """Choices and buttons of the plugin.

    Args:
        napari_viewer: Viewer in which layers are added. napari passes it by this name.
    """

    def __init__(self, napari_viewer: Any) -> None:
        self.viewer = napari_viewer
        self.predictor: Predictor | None = None
        self.stop_requested = threading.Event()
        # The worker's thread must not touch widgets of Qt.
        self._show_progress: Any = ensure_main_thread(self._set_progress)
        self.scan = create_widget(annotation="napari.layers.Image", label="Scan")
        self.model = FileEdit(label="Run or release", mode="d", tooltip="Folder of a finished run or of a release.")
        self.axes = LineEdit(
            label="Axes",
            tooltip="Directions in which the axes of the layer grow, such as SPL for axial slices with the lowest "
            "first. Leave it empty for scans that samgraft opened.",
        )
        self.mode = ComboBox(label="Segment", choices=(AUTOMATIC, PROMPTED))
        self.class_name = ComboBox(
            label="Next prompt is", choices=self._class_names, tooltip="Class of the next boxes and points."
        )
        self.inside = ComboBox(label="Points are", choices=(("inside", YES), ("outside", NO)))
        self.draw = PushButton(text="New prompt layers", tooltip="Prompts of hidden layers are left out.")
        self.start = PushButton(text="Segment")
        self.stop = PushButton(text="Stop", enabled=False)
        self.progress = ProgressBar(value=0, min=0, max=1)
        super().__init__(
            widgets=[self.scan, self.model, self.axes, self.mode, self.class_name, self.inside, self.draw, self.start,
                     self.stop, self.progress]
        )  # fmt: skip
        self.model.changed.connect(self.class_name.reset_choices)
        self.class_name.changed.connect(self._set_next_prompt)
        self.inside.changed.connect(self._set_next_prompt)
        self.draw.clicked.connect(self.add_prompt_layers)
        self.start.clicked.connect(self.segment)
        self.stop.clicked.connect(self.stop_requested.set)

    def _class_names(self, _: Any) -> tuple[str, ...]:
        """Return the classes of the chosen model. napari also calls this when its layers change."""
        try:
            return read_task(self.model.value).classes.names
        except SamgraftError:
            return ()  # no model is chosen yet

    def add_prompt_layers(self) -> None:
        """Add a layer for boxes and one for points, on the axes of the scan."""
        layer = self.scan.value
        if layer is None or self.class_name.value is None:
            show_warning("Choose a scan and a run or release first.")
            return
        pixel = float(abs(layer.scale[-1]))
        # Without a type pandas takes an empty column for numbers.
        empty = np.empty(0, dtype=object)
        self.viewer.add_shapes(
            ndim=layer.ndim, name="boxes", features={CLASS: empty}, edge_color="lime", face_color="transparent",
            edge_width=pixel,
        )  # fmt: skip
        self.viewer.add_points(ndim=layer.ndim, name="points", features={CLASS: empty, INSIDE: empty}, size=4 * pixel)
        self._set_next_prompt()

    def _next_prompt(self) -> dict[str, str]:
        return {CLASS: self.class_name.value, INSIDE: self.inside.value}

    def _set_next_prompt(self) -> None:
        """Give the chosen class and side to the boxes and points that are drawn next."""
        for layer in self._prompt_layers():
            known = [name for name in (CLASS, INSIDE) if name in layer.features]
            layer.feature_defaults = {name: self._next_prompt()[name] for name in known}
            if INSIDE in known:
                layer.current_face_color = "lime" if self.inside.value == YES else "red"

    def _prompt_layers(self) -> list[Any]:
        return [layer for layer in self.viewer.layers if isinstance(layer, Points | Shapes) and layer.visible]

    def segment(self) -> Any:
        """Start the segmentation of the chosen layer and return its worker, or None if it is refused."""
        layer = self.scan.value
        if layer is None:
            show_warning("Open a scan first.")
            return None
        try:
            with called_from_python():
                opened = scan_of_layer(layer, axes=self.axes.value)
                prompts = self._prompts(layer, opened) if self.mode.value == PROMPTED else None
        except SamgraftError as error:
            show_warning(error.render())
            return None
        _avoid_second_llvm()
        placed = {name: getattr(layer, name) for name in PLACEMENT}
        self.stop_requested.clear()
        self._show_running(True)
        worker = create_worker(self._compute, self.model.value, opened, prompts, _ignore_errors=True)
        worker.returned.connect(lambda done: self._add(done, opened, name=layer.name, placed=placed))
        worker.errored.connect(_show_error)
        worker.finished.connect(lambda: self._show_running(False))
        worker.start()
        return worker

    def _prompts(self, layer: Any, opened: LayerScan) -> PromptFile:
        classes = read_task(self.model.value).classes
        if self.class_name.value is None:
            raise UsageError("no class is chosen. Choose the class that the prompts mark.", where=layer.name)
        return prompts_of_layers(
            self._prompt_layers(), layer, opened, classes=classes, class_name=self.class_name.value
        )

    def _compute(self, model: Path, opened: LayerScan, prompts: PromptFile | None) -> Segmentation | None:
        """Load the model and segment, in the thread of the worker. The result is None after a stop."""
        with called_from_python():
            self.predictor = _load(model, self.predictor)
            try:
                return segment_scan(self.predictor, opened.scan, prompts=prompts, on_slices=self._on_slices)
            except _Stopped:
                return None

    def _on_slices(self, done: int, total: int) -> None:
        if self.stop_requested.is_set():
            raise _Stopped
        self._show_progress(done, total)

    def _set_progress(self, done: int, total: int) -> None:
        self.progress.max = total
        self.progress.value = done

    def _show_running(self, is_running: bool) -> None:
        self.start.enabled = not is_running
        self.stop.enabled = is_running
        self.progress.value = 0

    def _add(self, segmentation: Segmentation | None, opened: LayerScan, *, name: str, placed: dict[str, Any]) -> None:
        if segmentation is None:
            show_info("Stopped. No layer was added.")
            return
        layers: list[LayerData] = segmentation_layers(segmentation, opened, name=name, placed=placed)
        for data, arguments, _ in layers:
            self.viewer.add_labels(data, **arguments)
        counts = ", ".join(f"{name} {voxels} voxels" for name, voxels in segmentation.voxels.items())
        show_info("\n".join([counts, *segmentation.notes]))


class _Stopped(Exception):
    """Request to stop a segmentation."""


def _avoid_second_llvm() -> None:
    """Hide triton from torch where the viewer has loaded Mesa's LLVM."""
    # Triton has an LLVM of its own, and the second one in a process crashes it while it is loaded. torchvision imports
    # triton where it is installed, and only compiled models need it.
    maps = Path("/proc/self/maps")
    if "triton" not in sys.modules and maps.is_file() and "libLLVM" in maps.read_text():
        sys.modules["triton"] = None  # type: ignore[assignment]


def _load(path: Path, loaded: Predictor | None) -> Predictor:
    """Return the model of a run or release, which stays loaded while its card is the same."""
    if loaded is not None and loaded.model.folder in (path, path / "model"):
        card = loaded.model.folder / CARD_FILE
        if card.is_file() and Card.read(card) == loaded.model.card:
            return loaded
    return Predictor(path)


def _show_error(error: Exception) -> None:
    if not isinstance(error, SamgraftError):
        raise error
    show_warning(error.render())
