"""Clients of the formats that only fine-tuned models have, which are peft, MONAI and the pair.

``load_back`` runs this module in a fresh process:

    python -m samgraft.finetune.release.release_clients JOB.json
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from samgraft.finetune.release.monai_bundle import synthetic_scan
from samgraft.finetune.release.pair_format import pair_client
from samgraft.shared.files import file_sha256
from samgraft.shared.release.clients import Client, Outputs, read_subject
from samgraft.shared.release.load_back import main
from samgraft.shared.release.subject import sam_outputs
from samgraft.shared.scans.orientation import Plane, to_plane
from samgraft.shared.weights.load import load_sam
from torch import Tensor

SCHEMA = Path(__file__).with_name("bundle.schema.yaml")
SCRATCH = "scratch"


@torch.inference_mode()
def peft_client(path: Path, probe: Mapping[str, Tensor], options: Mapping[str, Any]) -> Outputs:
    """Load the base weights strictly and add the adapter with ``PeftModel.from_pretrained``."""
    from peft import PeftModel

    size = int(probe["pixels_N3SS"].shape[-1])
    if "base" in options:
        sam = load_sam(options["base"], image_size=size)
    else:
        sam = read_subject(path / "base.safetensors", image_size=size).build()
    model = PeftModel.from_pretrained(sam, str(path)).eval()
    adapted: Any = model.base_model.model
    return sam_outputs(adapted, probe), "peft's PeftModel.from_pretrained on the base"


def monai_client(path: Path, probe: Mapping[str, Tensor], options: Mapping[str, Any]) -> Outputs:
    """Verify the metadata against the local schema, then run the bundle on a synthetic scan."""
    from monai.bundle.config_parser import ConfigParser
    from monai.bundle.scripts import verify_metadata

    scratch = path.parent.with_name(f"{path.parent.name}.{SCRATCH}")
    scratch.mkdir()
    try:
        shutil.copyfile(SCHEMA, scratch / SCHEMA.name)
        metadata = path / "configs" / "metadata.json"
        # MONAI would download the schema, but it uses a file that already exists at ``filepath``.
        sha256 = file_sha256(SCHEMA)
        verify_metadata(
            meta_file=str(metadata), filepath=str(scratch / SCHEMA.name), hash_val=sha256, hash_type="sha256"
        )
        nib.save(synthetic_scan(probe), scratch / "scan.nii.gz")
        parser = ConfigParser()
        parser.read_config(str(path / "configs" / "inference.json"))
        parser.read_meta(str(metadata))
        parser["bundle_root"], parser["device"] = str(path), "$torch.device('cpu')"
        parser["image"], parser["output_dir"] = str(scratch / "scan.nii.gz"), str(scratch / "out")
        logits = parser.get_parsed_content("logits")
        parser.get_parsed_content("run")
        [mask] = (scratch / "out").glob("*.nii.gz")
        mask_ZHW = _read_mask(mask, scratch / "scan.nii.gz")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    slices = torch.as_tensor(logits.as_tensor() if hasattr(logits, "as_tensor") else logits).permute(3, 0, 2, 1)
    outputs = {"slices": slices, "mask": torch.from_numpy(mask_ZHW)}
    return outputs, "MONAI's ConfigParser, a synthetic scan through it"


def _read_mask(mask: Path, scan: Path) -> npt.NDArray[np.int32]:
    """Return the slices (Z, H, W) of a mask that must be on the scan's grid."""
    found, wanted = (nib.Nifti1Image.from_filename(str(path)) for path in (mask, scan))
    if found.shape != wanted.shape or not np.allclose(found.affine, wanted.affine):
        raise ValueError(
            f"the bundle's mask is not on the scan's grid (got shape {found.shape}, expected {wanted.shape})."
        )
    return to_plane(np.asarray(found.dataobj).astype(np.int32), found.affine, Plane.AXIAL)[0]


CLIENTS: dict[str, Client] = {"peft": peft_client, "monai": monai_client, "pair": pair_client}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], CLIENTS))
