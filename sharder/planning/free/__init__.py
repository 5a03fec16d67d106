"""Plans that are no chain of stages: any block on any device, the least latency, the least memory."""
