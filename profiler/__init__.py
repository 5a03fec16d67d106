"""Profiler: a model becomes a profile (time and memory of every unit on every device) and a cost graph."""
