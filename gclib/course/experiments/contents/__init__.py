"""What goes into the batch, trained: hard negatives against batch size, duplicates, temperature (chapter 12)."""
