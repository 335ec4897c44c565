"""A training run, from its settings to a saved model."""
