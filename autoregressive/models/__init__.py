"""The transformer, its condition embeddings, and its weights."""
