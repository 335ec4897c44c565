"""Does a bigger batch help? The first paper's table, trained on this machine."""
