"""Worker processes: one a device, and what they and their parent tell each other."""
