"""Losses of a batch: whole (dense), in tiles whose log-sum-exps merge (tiles), around a ring (ring)."""
