"""Schedules: their simulation, the split with the shortest step, and more shapes than one stage a device."""
