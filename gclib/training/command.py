"""The trainer behind `python -m gclib train`: alone or under torchrun, stopped and resumed to the same losses.

Under torchrun every process draws the same batch and takes its own rows; the first one writes the run's folder, which
all processes must see. `gclib.training.settings` has the options, `gclib.training.build` what they name,
`gclib.training.session` the folder.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from gclib.distributed import Rank, process_group, waiting_for_ranks
from gclib.support.validation import refuse
from gclib.training.build import build, check_config, load_data, prefixed, total_steps, with_prompts
from gclib.training.loop import TrainingRecord
from gclib.training.output import check_new_output, check_output, locked
from gclib.training.session import CONFIG, Session, StoppedBySignal, read_config
from gclib.training.settings import Settings, add_options, resumed, typed_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m gclib train`."""
    parser.add_argument("--output", type=a_folder, required=True, metavar="FOLDER", help="where the run is kept")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --output, by the settings kept there",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_options(parser)


def a_folder(text: str) -> Path:
    """The path; an empty text, which would be the folder that one is in, is refused by argparse in words."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must be a folder, got an empty text")
    return Path(text)


def command(arguments: argparse.Namespace) -> int:
    """Run what was typed; the exit status.

    0; 1 where a loss was no number, or disk or memory were full; 2 for what was refused; 128 + the signal's number
    after a signal.
    """
    try:
        settings = settings_for(arguments.output, typed_settings(arguments), resume=arguments.resume)
        run(settings, arguments.output, resume=arguments.resume, quiet=arguments.quiet)
        return 0
    except StoppedBySignal as stop:
        return _exit(128 + stop.signal_number, "" if arguments.quiet else f"{stop}{how_to_resume(arguments.output)}")
    except KeyboardInterrupt:
        return _exit(128 + signal.SIGINT, f"Stopped at once{how_to_resume(arguments.output)}")
    except ValueError as error:
        return _exit(2, error_line("train", error))
    except FloatingPointError as error:
        return _exit(1, error_line("train", error))
    except (OSError, MemoryError, RuntimeError) as error:
        if not is_of_the_machine(error):
            raise
        return _exit(1, error_line("train", error) + how_to_resume(arguments.output))


def how_to_resume(output: Path) -> str:
    """The end of a last line: what to type to go on, where there is a run."""
    line = f". To go on: python -m gclib train --output {shlex.quote(str(output))} --resume"
    return line if (output / CONFIG).is_file() else "."


def error_line(name: str, error: BaseException) -> str:
    """What went wrong, in one line."""
    return f"python -m gclib {name}: error: {' '.join(str(error).split()) or type(error).__name__}"


def is_of_the_machine(error: BaseException) -> bool:
    """Whether disk or memory, and not the program, is at fault."""
    words = ("out of memory", "can't allocate memory")
    return not isinstance(error, RuntimeError) or any(word in str(error) for word in words)


def settings_for(output: Path, typed: dict[str, Any], *, resume: bool) -> Settings:
    """What was typed, over the defaults or over the run that is resumed; checked before anything is loaded.

    ValueError for what can't be, for a folder that holds a run and no --resume, and for --resume without a run.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    check_output(output)
    if not resume:
        check_new_output(output)
        settings = Settings(**typed)
        settings.check(processes)
        settings.check_new()
        return settings.completed()
    config = read_config(output)
    settings = resumed(Settings(**config["settings"]), typed)
    if config["processes"] != processes and settings.dropout > 0:
        rule = f"must be {config['processes']}, as in the run that is resumed (dropout would be another one)"
        raise refuse("the number of processes", rule, processes)
    settings.check(processes)
    return settings


def run(settings: Settings, output: Path, *, resume: bool = False, quiet: bool = False) -> list[TrainingRecord]:
    """Train, evaluate and export as `settings` say; the records of the steps that were taken now.

    Raises ValueError for data, model and folder that don't fit, `StoppedBySignal`, and what `train` raises.
    """
    first = int(os.environ.get("RANK", 0)) == 0
    in_use = locked(output) if first else nullcontext()
    with in_use, fewer_words(quiet=quiet), process_group(timeout_seconds=settings.timeout_seconds) as rank:
        loud = rank.is_first and not quiet
        say = print if loud else (lambda *words: None)
        check_config(settings)
        settings = with_prompts(settings)
        with first_process_first(rank):
            pairs, held_out = load_data(settings, progress=loud)
        pairs, held_out = prefixed(pairs, settings), prefixed(held_out, settings)
        steps = steps_of(settings, len(pairs), output if resume else None)
        training = build(settings, pairs, rank, steps)
        chosen = [name for name in ("learning_rate", "warmup_steps") if getattr(settings, name) is None]
        chosen += [name for name in ("chunk_size",) if training.chunks]
        settings = dataclasses.replace(settings.with_rates(steps), **training.lengths, **training.chunks)
        session = Session(settings, output, rank, training, held_out, say, chosen)
        state = session.restore(pairs) if resume else session.begin(pairs)
        say(session.described(pairs))
        records = session.train(pairs, state, progress=loud)
        session.export()
        session.compare()
    return records


def steps_of(settings: Settings, pair_count: int, resumed_from: Path | None) -> int:
    """The run's updates: as it began with, or as the settings say where it is new or another length was typed."""
    if resumed_from is not None:
        config = read_config(resumed_from)
        saved = Settings(**config["settings"])
        if (saved.steps, saved.epochs) == (settings.steps, settings.epochs):
            return config["steps"]
    return total_steps(settings, pair_count)


@contextmanager
def first_process_first(rank: Rank) -> Iterator[None]:
    """Inside, the first process is done before the others begin: what it mines, they read from the cache.

    What it can't load the others can't load either, and say so themselves.
    """
    if not rank.is_first:
        _wait_for_all(rank)
    try:
        yield
    finally:
        if rank.is_first:
            _wait_for_all(rank)


def _wait_for_all(rank: Rank) -> None:
    if rank.world_size > 1:
        with waiting_for_ranks("loading the data"):
            dist.barrier()


@contextmanager
def fewer_words(*, quiet: bool) -> Iterator[None]:
    """transformers without its own progress bars; quiet: without its warnings too."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    if quiet:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _exit(status: int, message: str) -> int:
    """The exit status, after a last line; from another process than the first it says from which."""
    number = int(os.environ.get("RANK", 0))
    if message and (number == 0 or status not in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)):
        print(message if number == 0 else f"process {number}: {message}", file=sys.stderr)
    return status
