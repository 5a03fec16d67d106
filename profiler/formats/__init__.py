"""Profiles and cost graphs in other forms: costs by hand, networkx graphs, tables, GraphML."""
