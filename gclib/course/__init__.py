"""Only for the course: misconceptions by name (checks), the lab and its drawing (memory_lab), figures (plots)."""
