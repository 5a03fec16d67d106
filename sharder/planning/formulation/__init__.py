"""The formulation: from a cost graph to a problem of blocks, tensors between them, memory and devices."""
