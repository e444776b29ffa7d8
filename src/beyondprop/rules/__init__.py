"""Learning rules: each owns the update of a model, `step(x, y)` by `step(x, y)`."""
