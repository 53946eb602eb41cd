"""Handle a run as named tensors: names, files, other projects' names, and traces of other implementations."""
