"""Random jobs planned, run under the ledger and held against a grid: `python tests/benchmarks/bench_plans.py 300`.

`--first 60` begins with another job; `--call-tokens 0` makes calls cost nothing, so that a plan weighs FLOPs alone.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gclib import chunks
from tests.helpers.plans import encoder_pool, judge, random_job


def main(count: int, first: int) -> None:
    """Print how many went over budget, and the worst and the usual ratios, now and then and at the end."""
    pool, judged = encoder_pool(0), {}
    for seed in range(first, first + count):
        judged[seed] = judge(random_job(seed, pool))
        if len(judged) % 25 == 0 or len(judged) == count:
            tell(judged)


def tell(judged: dict) -> None:
    """What is known so far."""
    print(f"{len(judged)} jobs: {sum(one.of_budget > 1 for one in judged.values())} over budget by the ledger")
    for name in ("of_budget", "of_ledger", "cost_ratio", "flops_ratio"):
        values = sorted(getattr(one, name) for one in judged.values())
        usual, most = values[len(values) // 2], values[int(0.95 * len(values))]
        off = [seed for seed, one in judged.items() if getattr(one, name) > 1.05]
        over = f"above 1.05: {len(off)} {off if len(off) < 10 else ''}"
        print(f"  {name:12} median {usual:.4f}  95 % {most:.4f}  largest {values[-1]:.4f}  {over}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="?", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--call-tokens", type=int)
    options = parser.parse_args()
    if options.call_tokens is not None:
        chunks.CALL_TOKENS["cpu"] = options.call_tokens
    main(options.jobs, options.first)
