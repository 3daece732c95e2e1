"""Former home of the weights readers; cards of earlier releases import them from here."""

from samgraft.shared.weights.load import load_image_encoder, load_sam, read_weights

__all__ = ["load_image_encoder", "load_sam", "read_weights"]
