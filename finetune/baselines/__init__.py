"""U-Net and DynUNet baselines in 2D and 3D."""

from __future__ import annotations

from enum import Enum


class Baseline(Enum):
    """Baseline networks. MODEL= on the command line."""

    UNET_2D = "unet2d"
    """MONAI's U-Net with residual units, on slices."""
    UNET_3D = "unet3d"
    """3D variant, on patches of volumes."""
    DYNUNET_2D = "dynunet2d"
    """nnU-Net's network, without deep supervision, on slices."""
    DYNUNET_3D = "dynunet3d"
    """3D variant, on patches of volumes."""

    @property
    def is_volume(self) -> bool:
        """True for 3D."""
        return self.value.endswith("3d")
