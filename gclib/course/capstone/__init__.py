"""The capstone: briefs, plans for them, and what a plan is worth."""
