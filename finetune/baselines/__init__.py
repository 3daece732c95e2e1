"""U-Net and DynUNet baselines in 2D and 3D."""
