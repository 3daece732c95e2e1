"""Former home of ``load_sam`` and ``load_image_encoder``; cards of earlier releases import them from here."""

from samgraft.shared.weights.load import load_image_encoder, load_sam

__all__ = ["load_image_encoder", "load_sam"]
