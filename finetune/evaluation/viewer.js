// Multiplanar and 3D view of the scans embedded in this page; nothing is loaded from outside.
"use strict";
(() => {
  const root = document.getElementById("viewer");
  const say = (text) => { root.querySelector(".state").textContent = text; };
  const bytes = (id) => {
    const text = atob(document.getElementById(id).textContent.trim());
    return Uint8Array.from(text, (letter) => letter.charCodeAt(0)).buffer;
  };
  const key = JSON.parse(root.dataset.key);
  const colors = [[0, 0, 0, 0], ...key.map((entry) => [...entry.rgb, 255])];
  const labels = {
    R: colors.map((c) => c[0]), G: colors.map((c) => c[1]), B: colors.map((c) => c[2]), A: colors.map((c) => c[3]),
    labels: ["", ...key.map((entry) => entry.name)],
  };
  const select = root.querySelector("select");
  const opacity = root.querySelector("input");
  let shown = Promise.resolve();

  const show = async (view, place) => {
    root.dataset.state = "loading";
    say("loading");
    for (const volume of view.volumes.slice()) view.removeVolume(volume);
    await view.loadFromArrayBuffer(bytes(`scan-${place}`), "scan.nii.gz");
    await view.loadFromArrayBuffer(bytes(`marks-${place}`), "marks.nii.gz");
    view.volumes[0].cal_min = 0;
    view.volumes[0].cal_max = 255;
    view.volumes[1].setColormapLabel(labels);
    view.setOpacity(1, Number(opacity.value));
    view.setSliceType(view.sliceTypeMultiplanar);
    view.opts.multiplanarShowRender = 1;
    view.setMultiplanarLayout(2);
    // The patient's left at the right, as in the pictures above and as radiologists hang images.
    view.setRadiologicalConvention(true);
    view.updateGLVolume();
    view.scene.crosshairPos = JSON.parse(select.options[place].dataset.center);
    view.drawScene();
    say("Drag in a slice to move, in the 3D view to turn; the wheel scrolls through slices.");
    root.dataset.state = "ready";
  };

  const start = async () => {
    const view = new niivue.Niivue({ backColor: [1, 1, 1, 1], loadingText: "", logLevel: "error", crosshairWidth: 0.5 });
    await view.attachToCanvas(root.querySelector("canvas"));
    select.addEventListener("change", () => { shown = shown.then(() => show(view, select.selectedIndex)); });
    opacity.addEventListener("input", () => view.setOpacity(1, Number(opacity.value)));
    await show(view, 0);
  };
  if (!document.createElement("canvas").getContext("webgl2")) {
    root.dataset.state = "unsupported";
    say("This browser has no WebGL 2: the pictures above show the same cases.");
    return;
  }
  start().catch((error) => {
    root.dataset.state = "failed";
    say(`The viewer could not start: ${error.message}`);
  });
})();
