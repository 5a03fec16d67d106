"""Devices that are not here: the catalogue, declared clusters, and what steps would take there."""
