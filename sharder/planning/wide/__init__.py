"""Splits and bounds where there are too many closed sets to go through."""
