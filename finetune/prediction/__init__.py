"""Masks for new scans, in the scans' own geometry."""

from samgraft.finetune.prediction.predictor import Predictor

__all__ = ["Predictor"]
