"""The two commands: `python -m gclib data-card` and `python -m gclib table1 --quick`."""

import argparse
import sys

from gclib import datacard, experiments
from gclib.corpus import load_corpus


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gclib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    card = commands.add_parser("data-card", help="print the figures of the data card (data/README.md)")
    card.add_argument("--write", action="store_true", help="write them into the card too")
    table = commands.add_parser("table1", help="train sequential, accumulated and cached, and compare them")
    table.add_argument("--quick", action="store_true", help="10,240 pairs: minutes; without it, all of them")
    table.add_argument("--seed", type=int, default=0)
    table.add_argument("--fresh", action="store_true", help="train again what was saved")
    chosen = parser.parse_args(arguments)
    if chosen.command == "data-card":
        text = datacard.figures(load_corpus())
        if chosen.write:
            datacard.write_figures(text)
        print(text)
    else:
        setting = experiments.QUICK if chosen.quick else experiments.WHOLE
        results = experiments.table1(setting, seed=chosen.seed, fresh=chosen.fresh)
        print(experiments.format_table(results))
        first = results[0]
        print(
            f"\nPercent of {first.pool:,} test queries, each among as many passages; {first.examples:,} examples a row,"
        )
        print(f"seed {first.seed}, seconds of training with {first.threads} threads.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
