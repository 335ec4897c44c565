"""For every folder: refusals in words (validation), units (words), files that survive a crash (files)."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # of the checkout; for an installed package a folder that holds none of the project's files
