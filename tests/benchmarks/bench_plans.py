"""Random jobs planned, run under the ledger and held against a grid: `python tests/benchmarks/bench_plans.py 300`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.plans import encoder_pool, judge, random_job


def main(count: int) -> None:
    """Print how many went over budget, and the worst and the usual ratios, now and then and at the end."""
    pool, judged = encoder_pool(0), []
    for seed in range(count):
        judged.append(judge(random_job(seed, pool)))
        if len(judged) % 25 == 0 or len(judged) == count:
            tell(judged)


def tell(judged: list) -> None:
    """What is known so far."""
    print(f"{len(judged)} jobs: {sum(one.of_budget > 1 for one in judged)} over budget by the ledger", flush=True)
    for name in ("of_budget", "of_ledger", "cost_ratio", "flops_ratio"):
        values = sorted(getattr(one, name) for one in judged)
        usual, most = values[len(values) // 2], values[int(0.95 * len(values))]
        over = f"above 1.05: {sum(value > 1.05 for value in values)}"
        print(f"  {name:12} median {usual:.4f}  95 % {most:.4f}  largest {values[-1]:.4f}  {over}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
