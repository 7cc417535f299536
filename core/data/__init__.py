"""Images, image-text pairs and arrays on disk."""
