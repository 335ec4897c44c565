"""Several processes, right and wrong, for chapter 09."""
