"""Random jobs planned, run under the ledger and held against a grid: `python tests/benchmarks/bench_plans.py 300`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.plans import encoder_pool, judge, random_job


def main(count: int) -> None:
    """Print how many went over budget, and the worst and the usual ratios."""
    pool = encoder_pool(0)
    judged = [judge(random_job(seed, pool)) for seed in range(count)]
    print(f"{count} jobs: {sum(one.of_budget > 1 for one in judged)} over budget by the ledger")
    for name in ("of_budget", "of_ledger", "cost_ratio", "flops_ratio"):
        values = sorted(getattr(one, name) for one in judged)
        print(f"{name:12} median {values[len(values) // 2]:.4f}  95 % {values[int(0.95 * len(values))]:.4f}", end="")
        print(f"  largest {values[-1]:.4f}")
    print(f"{sum(one.flops_ratio > 1.05 for one in judged)} with more than 5 % more FLOPs than the grid's fewest")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
