"""Whether a pipeline computes what the unsharded model does."""
