"""The configuration and the evaluation of a training of the GPT."""
