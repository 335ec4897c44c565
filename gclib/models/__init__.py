"""Encoders (encoder, presets), and how they are kept (folder)."""
