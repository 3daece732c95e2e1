"""What both stages need to release weights: formats, load-back in a fresh process, card, licence, privacy gate."""
