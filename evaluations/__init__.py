"""Metrics: they see images and numbers, never a model of this project."""
