"""Training objectives of the transformer."""
