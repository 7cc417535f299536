"""Sampling codes: inference engine, key-value caches, samplers."""
