"""The recording of a forward: the graph of unit calls and glue, and what it hangs on."""
