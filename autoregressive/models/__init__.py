"""The transformer, its conditioning, and its weights."""
