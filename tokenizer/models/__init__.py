"""The VQGAN, its discriminators, and their weights."""
