"""From classes or prompts to images: the pipeline and the loop that the commands share."""
