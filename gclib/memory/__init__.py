"""A step's bytes: measured (ledger), forecast, planned (plan, step_plan); a card's usable bytes (devices)."""
