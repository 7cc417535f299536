"""The ground floor: configuration, processes, files, images. Imports none of the other packages."""
