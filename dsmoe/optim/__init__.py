"""Optimizers: which there are, what state each keeps, which parameters decay; and the one module that knows DeepSpeed's
insides. A new optimizer is one file here, or a package's entry point `dsmoe.optimizers` (dsmoe/optim/registry.py)."""
