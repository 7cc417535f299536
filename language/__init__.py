"""Captions: cleaning, text encoders, and features on disk."""
