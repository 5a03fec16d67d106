"""The stages of a pipeline on PyTorch's engine: cut, run, observed."""
