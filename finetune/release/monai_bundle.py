"""The MONAI bundle of a fine-tuned model, with metadata, inference configuration and weights.

MONAI executes a bundle's configuration, so users should run bundles from trusted sources only. samgraft itself runs no
bundle except the one that it has just written, for the load-back check.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from samgraft.finetune.inference import evaluating
from samgraft.finetune.loss import with_background
from samgraft.finetune.model_folder import FinishedModel
from samgraft.finetune.task import Task
from samgraft.shared.release.formats import Artefact, Format
from samgraft.shared.release.privacy import MONAI_SCHEMA_URL
from samgraft.shared.release.subject import Subject
from samgraft.shared.samples.frame import fit_frame, image_to_frame, logits_to_native
from samgraft.shared.scans.intensity import measure_intensity, normalise
from samgraft.shared.scans.orientation import Plane, native_grid, to_native
from samgraft.shared.scans.volume import Modality
from samgraft.shared.weights.save import write_pth
from torch import Tensor


def monai_format(model: FinishedModel) -> Format:
    """Return the ``monai`` format of one model."""

    def why_not(_: Subject) -> str | None:
        if importlib.util.find_spec("jsonschema") is None:
            return "jsonschema, which checks the metadata, is not installed. Run pip install 'samgraft[monai]'."
        return _why_no_bundle(model.task)

    def write(subject: Subject, folder: Path) -> list[Artefact]:
        folder = folder / "monai"
        for part in ("configs", "models", "docs"):
            (folder / part).mkdir(parents=True)
        write_pth(folder / "models" / "model.pt", {f"segmenter.sam.{k}": v for k, v in subject.tensors.items()})
        _write_json(folder / "configs" / "metadata.json", metadata(model))
        _write_json(folder / "configs" / "inference.json", inference_config(model, subject))
        (folder / "docs" / "README.md").write_text(_README, encoding="utf-8")
        return [Artefact(path="monai", client="monai")]

    return Format(name="monai", why_not=why_not, write=write)


def _why_no_bundle(task: Task) -> str | None:
    """Return the reason why a bundle would give other masks than the model."""
    if task.planes:
        return "a bundle segments axial slices only, and this model averages the probabilities of several planes."
    if task.classes.is_overlapping:
        return "a bundle writes one label id per voxel, and the regions of this model overlap."
    if task.num_neighbours:
        return "a bundle segments each slice alone, and this model reads the slices beside it."
    if task.inference().prompt.is_prompted:
        return "a bundle segments without prompts, and this model needs them."
    return None


_README = """Run in the bundle's folder, with samgraft installed:

    python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json \\
        --bundle_root . --image scan.nii.gz

The mask is written on the scan's own grid into `output/`, without the post-processing of `samgraft predict`. The
release's README.md describes the model, its scores, limits and licence.
"""


def metadata(model: FinishedModel) -> dict[str, Any]:
    """Return the content of ``configs/metadata.json``."""
    task = model.task
    channels = {"0": "background", **{str(i): name for i, name in enumerate(task.class_names, start=1)}}
    image = {
        "type": "image",
        "format": "magnitude" if task.modality == Modality.MRI.value else "intensity",
        "modality": task.modality,
        "num_channels": 1,
        "spatial_shape": ["*", "*", "*"],
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": False,
        "channel_def": {"0": "image"},
    }
    pred = {
        **image,
        "format": "segmentation",
        "num_channels": len(channels),
        "value_range": [0, max(task.class_ids)],
        "channel_def": channels,
    }
    return {
        "schema": MONAI_SCHEMA_URL,
        "version": "0.1.0",
        "changelog": {"0.1.0": "first release"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"samgraft": version("samgraft"), "nibabel": version("nibabel")},
        "name": "samgraft model",
        "task": f"Segmentation of {', '.join(task.class_names)} in {task.modality} slices",
        "description": "Segment Anything, fine-tuned to segment named classes without prompts.",
        "authors": "the releaser",
        "copyright": "see the release's README.md",
        "data_source": "see the release's README.md",
        "data_type": "nibabel",
        "image_classes": f"one channel, {task.modality}",
        "label_classes": "label ids as in pred_classes",
        "pred_classes": ", ".join(f"{i} {n}" for i, n in zip(task.class_ids, task.class_names, strict=True)),
        "intended_use": "Research only; not a medical device.",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
    }


def inference_config(model: FinishedModel, subject: Subject) -> dict[str, Any]:
    """Return the content of ``configs/inference.json``."""
    task = model.task
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        # The two settings that users override on the command line.
        "image": "scan.nii.gz",
        "output_dir": "$@bundle_root + '/output'",
        "network_def": {
            "_target_": "samgraft.finetune.slice_network.SliceNetwork",
            "spec": subject.spec.to_dict(),
            "image_size": subject.image_size,
            "num_classes": task.classes.num_classes,
            "num_mask_tokens": subject.num_mask_tokens,
            "keep_aspect": task.keep_aspect,
        },
        "weights": "$torch.load(@bundle_root + '/models/model.pt', map_location='cpu', weights_only=True)",
        "network": "$(@network_def.load_state_dict(@weights, strict=True), @network_def.to(@device).eval())[1]",
        "preprocessing": _preprocessing(task),
        # -1 takes the whole slice, whose size differs between scans.
        "inferer": {"_target_": "SliceInferer", "roi_size": [-1, -1], "spatial_dim": 2, "sw_batch_size": 8},
        "postprocessing": _postprocessing([0, *task.class_ids]),
        "data": "$@preprocessing({'image': @image})",
        "logits": "$@inferer(@data['image'][None].to(@device), @network)[0]",
        "initialize": [],
        "run": ["$@postprocessing({'pred': @logits.cpu()})"],
        "finalize": [],
    }


def _preprocessing(task: Task) -> dict[str, Any]:
    normalise_ = {
        "_target_": "samgraft.finetune.release.bundle_transforms.NormaliseIntensityd",
        "keys": "image",
        "preset": task.intensity,
        "modality": task.modality,
    }
    return {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader", "dtype": "$None"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {"_target_": "samgraft.finetune.release.bundle_transforms.DisplayOrientationd", "keys": "image"},
            normalise_,
        ],
    }


def _postprocessing(ids: list[int]) -> dict[str, Any]:
    """Return the transforms from channels to label ids, saved on the scan's own grid."""
    save = {
        "_target_": "SaveImaged",
        "keys": "pred",
        "output_dir": "@output_dir",
        "output_postfix": "seg",
        "resample": False,
        "output_dtype": "$torch.int32",
        "separate_folder": False,
    }
    to_ids = {
        "_target_": "MapLabelValued",
        "keys": "pred",
        "orig_labels": list(range(len(ids))),
        "target_labels": ids,
    }
    to_file = {"_target_": "samgraft.finetune.release.bundle_transforms.FileOrientationd", "keys": "pred"}
    to_channel = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
    return {"_target_": "Compose", "transforms": [to_channel, to_ids, to_file, save]}


def synthetic_scan(probe: Mapping[str, Tensor]) -> nib.Nifti1Image:
    """Return a small scan made of the probe's images, whose file has other axes than slices have.

    Its axes grow towards the feet, to the right and to the front, the slices are thick and the pixels are not square,
    so that a bundle without reorientation or with exchanged axes gives other masks.
    """
    affine = np.array([[0, 1.1, 0, 0], [0, 0, 0.9, 0], [-5, 0, 0, 0], [0, 0, 0, 1]])
    volume_ZHW = synthetic_volume(probe)
    shape_ijk = (len(volume_ZHW), volume_ZHW.shape[2], volume_ZHW.shape[1])
    return nib.Nifti1Image(to_native(volume_ZHW, native_grid(affine, shape_ijk), Plane.AXIAL), affine)


def synthetic_volume(probe: Mapping[str, Tensor]) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Return the slices (Z, H, W) of the synthetic scan."""
    # Not square, so that exchanged axes and a wrong padding are found.
    images_NSS = probe["images_NSS3"][..., 0]
    return np.ascontiguousarray(images_NSS[:, :, : 3 * images_NSS.shape[2] // 4].numpy().astype(np.int16))


def expected_slices(model: FinishedModel, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the outputs that a bundle must reproduce for the synthetic volume.

    Returns:
        ``slices``, logits (Z, 1 + C, H, W) with the background first, and ``mask``, label ids (Z, H, W).
    """
    volume_ZHW = synthetic_volume(probe)
    config = model.task.inference()
    stats = measure_intensity(volume_ZHW, modality=Modality(model.task.modality))
    images = np.stack([normalise(slice_HW, stats, config.intensity) for slice_HW in volume_ZHW])
    size = model.segmenter.image_size
    frame = fit_frame((volume_ZHW.shape[1], volume_ZHW.shape[2]), image_size=size, keep_aspect=config.keep_aspect)
    with evaluating(model.segmenter):
        images_N1SS = image_to_frame(torch.from_numpy(images)[:, None], frame)
        logits = logits_to_native(model.segmenter(images_N1SS).float(), frame)
    return {"slices": with_background(logits), "mask": model.task.classes.from_logits(logits).to(torch.int32)}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
