"""What is said beside a plan: what else one could do, why, how surely, and what would change it."""
