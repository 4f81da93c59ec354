"""Optimizers as data: see `jaxlm.optim.chain`."""
