"""Around the optimizer: parameter groups, and where gradients are written."""
