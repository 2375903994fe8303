"""A trained model with fewer experts: those that no token takes are dropped, those that do the same are merged."""
