"""Sharder: a cost graph becomes a plan (planning), and a plan becomes something that runs (runtime)."""
