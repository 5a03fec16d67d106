"""How one step is measured: what is timed, on which clock, and what of it is remembered."""
