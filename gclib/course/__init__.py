"""Only for the course: misconceptions by name (checks/ch05.py), the lab (memory_lab/, drawn by page/view.js), plots."""
