"""Codes and captions for training."""
