"""Former import path of the weights readers, which cards of earlier releases name."""

from samgraft.shared.weights.load import load_image_encoder, load_sam, read_weights

__all__ = ["load_image_encoder", "load_sam", "read_weights"]
