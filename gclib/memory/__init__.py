"""A step's bytes: measured (ledger), forecast, planned (plan); a card's usable bytes (devices), plans of a real batch (step_plan)."""
