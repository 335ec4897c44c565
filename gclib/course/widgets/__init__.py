"""The other widgets of the chapters, and what all of them share."""
