"""A step's bytes: measured (ledger), forecast, planned (plan); cards (devices), a card's usable bytes (step_plan)."""
