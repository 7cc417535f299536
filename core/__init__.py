"""The ground floor: configuration, processes, files, images. Imports none of the other packages."""

__version__ = "0.2.0"
