"""What a benchmark imports first: it puts this checkout's gclib, and the tests' helpers, before any installed one."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
