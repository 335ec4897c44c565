"""The losses of a batch: whole, in tiles, and around a ring of processes."""
