"""The metrics, as functions of features or images."""
