"""Pipelines in one process: a thread a device."""
