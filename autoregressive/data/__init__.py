"""Training data: codes with classes or captions."""
