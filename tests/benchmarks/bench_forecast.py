"""Seconds of the first forecast of each preset, laws read off anew: the bar is 3 s, for decoders 8 s.

    python tests/benchmarks/bench_forecast.py [--presets NAME ...]

Each preset in a process of its own with an empty cache: a gradient-cache step of 256 pairs in chunks of 16, 64 tokens
(or a picture) a row. As in the lab, which begins with a small model, a forecast of `mini` comes first: it loads what
torch and transformers load once a session, and its seconds stand in the last column.
"""

import argparse
import os
import subprocess
import sys
import tempfile

import paths

from gclib.models.presets import PRESETS

BAR_SECONDS, DECODER_SECONDS = 3.0, 8.0
DECODERS = ("qwen3", "embeddinggemma")  # layers of a language model, with twice the operations of a BERT's
ONE = """
import sys, time
import transformers.models.auto
from gclib import config_of, forecast_step
name = sys.argv[1]
length = None if hasattr(config_of(name), "image_size") else 64
same = {"batch_size": 256, "chunk_size": 16}
begin = time.perf_counter()
forecast_step("grad_cache", config="mini", query_length=32, passage_length=32, **same)
start = time.perf_counter()
peak = forecast_step("grad_cache", config=name, query_length=length, passage_length=length, **same).peak_bytes
print(time.perf_counter() - start, peak, start - begin)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    over = 0
    for name in parser.parse_args().presets:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"GCLIB_CACHE": folder, "PYTHONPATH": str(paths.ROOT)}
            command = [sys.executable, "-c", ONE, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        seconds, peak, before = (float(word) for word in done.stdout.split()[-3:])
        bar = DECODER_SECONDS if name.startswith(DECODERS) else BAR_SECONDS
        over += seconds > bar
        verdict = "within" if seconds <= bar else "over"
        print(f"{name:28}{seconds:6.2f} s {verdict:7}{bar:4.0f} s   {peak / 2**20:9,.0f} MiB   {before:5.2f} s before")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
