"""How a model is placed: parameters moved, and what makes tensors follow."""
