"""Encoders, and how they are kept."""
