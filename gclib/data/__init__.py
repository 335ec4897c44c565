"""Text pairs, tokens, and what goes into a batch."""
