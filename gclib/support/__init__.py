"""What every room uses, and where the project stands."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # of the checkout; for an installed package a folder that holds none of the project's files
