"""Clipping rules: from the complete norms of units to the coefficients of their gradients. One file a rule."""
