"""A step's bytes: measured (ledger), forecast, planned (plan); cards (devices), what is free of one (step_plan)."""
