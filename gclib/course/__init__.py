"""Only for the course: misconceptions by name (checks/ch05.py), the lab, drawn (memory_lab/page/view.js), plots."""
