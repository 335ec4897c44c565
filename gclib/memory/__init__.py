"""Every byte of a step, measured and forecast, and the plan that fits."""
