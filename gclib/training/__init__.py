"""A run, from its settings to a saved model; checkpoints that a kill can't spoil (checkpoints)."""
