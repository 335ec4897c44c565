"""Only for the course: misconceptions by name (checks), the lab (memory_lab), what draws it (plots)."""
