"""Exact splits where the closed sets can be gone through: of lines, and of graphs."""
