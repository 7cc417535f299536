"""Sampling codes from the transformer: engine, cache, samplers."""
