"""A run as named tensors: names, files, the names of other projects, and traces of other implementations."""
