"""Planning: from a cost graph to a plan with its proof. Nothing here imports torch."""
