"""A step's bytes: measured (ledger), forecast (forecast), planned (plan); what a card can use (devices)."""
