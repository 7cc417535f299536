"""The parts of tokenizer.train: its configuration, models, step and validation."""
