"""Seven commands: `python -m gclib` and one of course, data-card, table1, train, evaluate, calibrate, zoo."""

import argparse
import math
import sys

import torch

from gclib.audit.zoo import format_zoo, run_zoo
from gclib.course.experiments.recipes import QUICK, WHOLE, TableSetting
from gclib.course.experiments.results import table1
from gclib.course.experiments.summaries import format_results
from gclib.course.handout import hand_out
from gclib.data import card
from gclib.data.corpus import load_corpus
from gclib.memory import calibration, recording
from gclib.support.files import cache_folder
from gclib.training import command as train
from gclib.training import evaluation

TABLE1 = """Train the same small encoder four times on the text pairs of the corpus: sequentially in batches of 8, with
gradient accumulation (16 chunks of 8), and with the gradient cache in batches of 128 and of 512. Prints a row each: the
percent of test queries whose own passage, or a twin's, is among the first 1, 5, 20 and 100 of the test passages, the
mean reciprocal rank, and the seconds of training. Rows are kept in {folder} and read from there the next time, as long
as data, settings and code are the same. Chapter 10 reads them too, and trains three seeds."""

TRAIN = """Train one encoder for queries and passages, alone or in several processes:

  python -m gclib train --output runs/first --batch-size 512 --chunk-size 32 --epochs 2
  torchrun --nproc-per-node 4 -m gclib train --output runs/second --batch-size 4096 --tile-size auto --ring

The folder holds config.json, records.jsonl (a line a step), evaluations.jsonl, checkpoints and at the end model/, which
transformers and sentence-transformers load. A run that was stopped or killed goes on with --output FOLDER --resume, to
the same losses; --resume --epochs 3 makes a finished one longer. Weights from a folder start at a lower rate, with a
warm-up; the test pairs are asked before the first step and after the last. Everything is read before the first step; a
batch is cut into chunks, so it need not fit."""

EVALUATE = """Print how well a saved or a pretrained model finds the passages of the test pairs:

  python -m gclib evaluate runs/first
  python -m gclib evaluate sentence-transformers/all-MiniLM-L6-v2 --data my_pairs --query-prefix "query: "

top-k is the share of queries whose own passage, or a twin's, is among the first k of all passages of the test pairs;
mrr is the mean of 1 / its rank. A run's folder stands for its model/, with the run's own data, lengths and prefixes."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command == "train":
        return train.command(chosen)
    if chosen.command == "evaluate":
        return evaluation.command(chosen)
    if chosen.command == "calibrate":
        _calibrate(chosen, parser)
    elif chosen.command == "zoo":
        return _zoo(chosen, parser)
    elif chosen.command == "course":
        _course(chosen, parser)
    elif chosen.command == "data-card":
        _data_card(write=chosen.write)
    else:
        if chosen.seed < 0:
            parser.error(f"--seed must be at least 0, got {chosen.seed}")
        _table1(QUICK if chosen.quick else WHOLE, seed=chosen.seed, fresh=chosen.fresh)
    return 0


def _calibrate(chosen: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if not 0 < chosen.seconds < math.inf:
        parser.error(f"--seconds must be a finite number above 0, got {chosen.seconds}")
    if chosen.record and not torch.cuda.is_available():
        parser.error("--record needs a CUDA card that PyTorch can use, and there is none here")
    measured = calibration.calibrate(seconds=chosen.seconds, on_reading=lambda reading: print(reading.case, flush=True))
    print(calibration.format_calibration(measured))
    if chosen.record:
        command = f"python -m gclib calibrate --seconds {chosen.seconds:g} --record {chosen.record}"
        print(f"recorded in {recording.record_card(measured, chosen.record, command=command)}")


def _course(chosen: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    try:
        print(hand_out(chosen.folder).report())
    except ValueError as error:
        parser.error(str(error))


def _zoo(chosen: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        options = {"forecast": not chosen.no_forecast, "processes": chosen.processes}
        rows = run_zoo(chosen.names or None, **options, on_row=lambda row: print(row.name, file=sys.stderr, flush=True))
    except ValueError as error:
        parser.error(str(error))
    print(format_zoo(rows))
    return int(not all(row.right for row in rows))


def _data_card(*, write: bool) -> None:
    figures = card.figures(load_corpus())
    if write:
        card.write_figures(figures)
    print(figures)


def _table1(setting: TableSetting, *, seed: int, fresh: bool) -> None:
    results = table1(setting, seed=seed, fresh=fresh)
    print(format_results(results))
    first = results[0]
    print(f"\nPercent of {first.pool:,} test queries, each among as many passages; {first.examples:,} examples a row,")
    print(f"seed {first.seed}, seconds of training with {first.threads} threads.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gclib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    figures = commands.add_parser(
        "data-card",
        help="print the figures of the data card (data/README.md)",
        description="Print the figures of the data card (data/README.md); mines the pairs if they are not kept.",
    )
    figures.add_argument("--write", action="store_true", help="write them into the card too")
    table = commands.add_parser(
        "table1",
        help="train sequential, accumulated and cached, and compare them",
        description=TABLE1.format(folder=cache_folder()),
    )
    table.add_argument(
        "--quick", action="store_true", help="2,048 pairs: a minute or two; without it, 8,192 and longer texts"
    )
    table.add_argument("--seed", type=int, default=0, help="of the weights and the order of the pairs (default: 0)")
    table.add_argument("--fresh", action="store_true", help="train again what was saved")
    measured = commands.add_parser(
        "calibrate",
        help="measure this device against its forecasts",
        description="Run a few steps of rising size on the GPU (without one, on the processor), print what they took "
        "beside what was forecast, and the budget to give forecasts for this device. Kept in the cache folder.",
    )
    measured.add_argument("--seconds", type=float, default=30.0, help="when to stop (default: 30)")
    measured.add_argument("--record", metavar="FOLDER", help="also record steps on the GPU, into a file in this folder")
    words = "copy the course's notebooks into a folder of yours"
    course = commands.add_parser("course", help=words, description=f"{words.capitalize()}; no file there is changed.")
    course.add_argument("folder", metavar="FOLDER")
    _add_zoo(commands)
    _add_training(commands)
    return parser


def _add_training(commands: argparse._SubParsersAction) -> None:
    """The commands that train a model and ask what it finds."""
    training = commands.add_parser(
        "train",
        help="train an encoder with a batch as large as you like, and keep it",
        description=TRAIN,
        usage="python -m gclib train --output FOLDER [--resume] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_arguments(training)
    evaluated = commands.add_parser(
        "evaluate",
        help="does a model find the right passages?",
        description=EVALUATE,
        usage="python -m gclib evaluate MODEL [--data FOLDER] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluation.add_arguments(evaluated)


def _add_zoo(commands: argparse._SubParsersAction) -> None:
    zoo = commands.add_parser(
        "zoo",
        help="try the step on a hundred small architectures of transformers",
        description="Print a table of small transformers: how far the cached gradient is from the naive one (float64), "
        "what verification said, and the memory forecast against the ledger. Exit status 1 where one is wrong.",
    )
    zoo.add_argument("names", nargs="*", metavar="NAME", help="architectures, as the table names them (default: all)")
    zoo.add_argument("--no-forecast", action="store_true", help="gradients alone: a quarter of the time")
    zoo.add_argument("--processes", type=int, default=2, help="at once (default: 2)")


if __name__ == "__main__":
    sys.exit(main())
