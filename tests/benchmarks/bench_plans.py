"""Random jobs planned, run under the ledger and held against a grid: `python tests/benchmarks/bench_plans.py 300`.

Each job is planned twice: with the price of calls that `plan_step` reckons with, and as if calls cost nothing, where a
plan weighs FLOPs alone. Nothing is timed. A line a plan goes to results/plans.csv; `--first 60` begins with another job
and adds to the file.
"""

import argparse
import csv
import dataclasses

import paths
import torch

from gclib import chunks
from tests.helpers.plans import Judged, encoder_pool, judge, random_job

RESULTS = paths.RESULTS / "plans.csv"
RATIOS = [field.name for field in dataclasses.fields(Judged)]
OFF = 1.01  # ratios above this are named


def main(count: int, first: int) -> None:
    """Judge the jobs' plans; print now and at the end how many went over budget, and the usual and worst ratios."""
    pool, usual = encoder_pool(0), chunks.CALL_TOKENS["cpu"]
    judged: dict[int, dict[int, Judged]] = {usual: {}, 0: {}}
    torch.set_num_threads(1)  # the jobs are tiny
    with RESULTS.open("a" if first else "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        if not first:
            table.writerow(["job", "call_tokens", *RATIOS])
        for seed in range(first, first + count):
            job = random_job(seed, pool)
            for price, plans in judged.items():
                chunks.CALL_TOKENS["cpu"] = price
                plans[seed] = judge(job)
                table.writerow([seed, price, *(f"{ratio:.5f}" for ratio in dataclasses.astuple(plans[seed]))])
            chunks.CALL_TOKENS["cpu"] = usual
            file.flush()
            if len(plans) % 25 == 0 or len(plans) == count:
                tell(judged)


def tell(judged: dict[int, dict[int, Judged]]) -> None:
    """What is known so far."""
    for price, plans in judged.items():
        over = sum(one.of_budget > 1 for one in plans.values())
        print(f"{len(plans)} jobs, {price} tokens a call: {over} over budget by the ledger")
        for name in RATIOS:
            values = sorted(getattr(one, name) for one in plans.values())
            usual, most = values[len(values) // 2], values[int(0.95 * len(values))]
            off = [seed for seed, one in plans.items() if getattr(one, name) > OFF]
            named = f"above {OFF}: {len(off)} {off if len(off) < 10 else ''}"
            print(f"  {name:12} median {usual:.4f}  95 % {most:.4f}  largest {values[-1]:.4f}  {named}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="?", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    main(options.jobs, options.first)
