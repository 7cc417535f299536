"""Ways to sample several codes of an image per step."""
