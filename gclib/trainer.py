"""The trainer behind `python -m gclib train`: alone or under torchrun, stopped and resumed to the same losses.

A run is a folder: config.json (settings, data, versions), records.jsonl (one record a step), evaluations.jsonl,
checkpoint-000100/ (see `gclib.checkpoints`) and, at the end, model/, which transformers and sentence-transformers load.
Under torchrun every process draws the same batch and takes its own rows; the first one writes. All processes must see
the folder.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from gclib.cache import write_atomically
from gclib.checkpoints import (
    Checkpoint,
    latest_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    write_checkpoint,
)
from gclib.data import TextPair, load_pairs, texts_of, train_tokenizer
from gclib.distributed import Rank, average_gradients, process_group
from gclib.encoder import Encoder, config_for, pooling_for
from gclib.losses import ContrastiveLoss
from gclib.modelfolder import save_model_folder
from gclib.negatives import mine_hard_negatives
from gclib.pairfiles import load_own_pairs
from gclib.retrieval import retrieval_metrics
from gclib.settings import Settings, add_options, resumed, typed_settings
from gclib.steps import accumulation_step, grad_cache_step, naive_step
from gclib.training import TrainingRecord, TrainingState, train
from gclib.validation import refuse

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal ended the training after a step, and a checkpoint of it is written."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped after step {step}")
        self.step, self.signal_number = step, signal_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m gclib train`."""
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the run is kept")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --output, by the settings kept there",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_options(parser)


def command(arguments: argparse.Namespace) -> int:
    """Run what was typed; the exit status: 0, 2 for what was refused, 128 + the signal's number when stopped."""
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        settings = settings_for(arguments.output, typed_settings(arguments), resume=arguments.resume)
        run(settings, arguments.output, resume=arguments.resume, quiet=arguments.quiet)
    except ValueError as error:
        if first:
            print(f"python -m gclib train: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        if first and not arguments.quiet:
            print(
                f"Stopped after step {stop.step}. To go on: python -m gclib train --output {arguments.output} --resume"
            )
        return 128 + stop.signal_number
    return 0


def settings_for(output: Path, typed: dict[str, Any], *, resume: bool) -> Settings:
    """What was typed, over the defaults or over the run that is resumed; checked before anything is loaded.

    ValueError for what can't be, for a folder that holds a run and no --resume, and for --resume without a run.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    config = output / "config.json"
    if not resume:
        if config.exists():
            raise refuse("--output", "must be a new folder, or be given with --resume", f"{output}, which holds a run")
        settings = Settings(**typed)
        settings.check(processes)
        return settings.completed()
    if not config.is_file():
        raise refuse("--resume", "must be given with the --output of a run", f"{output}, which holds no config.json")
    kept = json.loads(config.read_text("utf-8"))
    saved = Settings(**kept["settings"])
    settings = resumed(saved, typed)
    if kept["processes"] != processes and settings.dropout > 0:
        rule = f"must be {kept['processes']}, as in the run that is resumed (dropout would be another one)"
        raise refuse("the number of processes", rule, processes)
    settings.check(processes)
    return settings


def run(settings: Settings, output: Path, *, resume: bool = False, quiet: bool = False) -> list[TrainingRecord]:
    """Train, evaluate and export as `settings` say; the records of the steps that were taken now.

    Raises ValueError for data, model and folder that don't fit, `Stopped` after a signal, and what `train` raises.
    """
    with process_group(timeout_seconds=settings.timeout_seconds) as rank:
        say = print if rank.is_first and not quiet else (lambda *words: None)
        with first_process_first(rank):
            pairs, held_out = load_data(settings, progress=rank.is_first and not quiet)
        steps = settings.steps or max(1, settings.epochs * (len(pairs) // settings.batch_size))
        model = build(settings, pairs, rank.device)
        session = Session(settings, output, rank, steps, held_out, say, *model)
        config = session.config(pairs)
        if resume:
            state = session.restore(config)
        else:
            state = TrainingState()
            session.write_config(config)
        say(f"{session.described()}: {len(pairs):,} pairs, {steps:,} steps of {settings.batch_size} queries")
        records = session.train(pairs, state, progress=rank.is_first and not quiet)
        session.export()
    return records


def load_data(settings: Settings, *, progress: bool) -> tuple[list[TextPair], list[TextPair]]:
    """The pairs to train on, with their hard negatives, and those to evaluate on."""
    if settings.data is None:
        load = functools.partial(load_pairs, progress=progress)
    else:
        columns = {"query": settings.query_column, "passage": settings.passage_column}
        load = functools.partial(load_own_pairs, settings.data, **columns)
    pairs = load(split="train", limit=settings.train_pairs)
    held_out = load(split="test", limit=settings.test_pairs) if settings.test_pairs else []
    if settings.negatives:
        pairs = mine_hard_negatives(pairs, per_query=settings.negatives, seed=settings.seed)
    if len(pairs) < settings.batch_size:
        raise refuse("--batch-size", f"must be at most the number of pairs, {len(pairs)}", settings.batch_size)
    return pairs, held_out


def build(
    settings: Settings, pairs: Sequence[TextPair], device: torch.device
) -> tuple[Encoder, Any, ContrastiveLoss, torch.optim.Optimizer]:
    """Encoder (one for both towers), tokenizer, loss and optimizer, on the device; the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        encoder, tokenizer = fresh_model(settings, pairs) if settings.is_fresh else given_model(settings)
    longest = max(settings.query_length, settings.passage_length)
    room = min(getattr(encoder.model.config, "max_position_embeddings", longest), tokenizer.model_max_length)
    if longest > room:
        raise refuse("--query-length and --passage-length", f"must be at most the model's {room} tokens", longest)
    loss_fn = ContrastiveLoss(
        settings.temperature,
        learnable=settings.learnable_temperature,
        symmetric=settings.symmetric,
        tile_size=settings.tile_size,
        gather=not settings.ring,
        ring=settings.ring,
    )
    encoder.to(device)
    loss_fn.to(device)
    parameters = [*encoder.parameters(), *loss_fn.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return encoder, tokenizer, loss_fn, torch.optim.AdamW(groups, lr=settings.learning_rate)


def fresh_model(settings: Settings, pairs: Sequence[TextPair]) -> tuple[Encoder, Any]:
    """An encoder with fresh weights, and a tokenizer trained on the pairs."""
    config = config_for(settings.model, settings.vocab_size, settings.dropout)
    tokenizer = train_tokenizer(pairs, vocab_size=config.vocab_size)
    config.pad_token_id = tokenizer.pad_token_id
    encoder = Encoder.from_config(config, pooling=pooling_for(settings.model, settings.pooling))
    if encoder.reads_pictures:
        raise refuse("--model", "must read text", settings.model)
    return encoder, tokenizer


def given_model(settings: Settings) -> tuple[Encoder, Any]:
    """The encoder and the tokenizer of a folder, or of a name on the hub."""
    encoder = Encoder.from_pretrained(settings.model, pooling=settings.pooling or "mean")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise refuse("--model", "must hold a tokenizer beside the model", settings.model) from error
    return encoder, tokenizer


def step_function(settings: Settings, rank: Rank, modules: Sequence[nn.Module]) -> Callable[..., Tensor]:
    """The step as `train` takes it: under autocast if asked for, and the gradients averaged over the processes."""
    if settings.step == "naive":
        taken = naive_step
    elif settings.step == "accumulation":
        taken = functools.partial(accumulation_step, chunk_size=settings.chunk_size)
    else:
        chunks = {"chunk_size": settings.chunk_size, "chunk_tokens": settings.chunk_tokens}
        taken = functools.partial(grad_cache_step, **chunks, retain_chunks=settings.retain_chunks)
    kind, enabled = rank.device.type, settings.autocast == "bf16"

    def step(encoders: Sequence[Any], inputs: Sequence[Any], loss_fn: Any) -> Tensor:
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled):
            loss = taken(encoders, inputs, loss_fn)
        average_gradients(*modules)
        return loss

    return step


@dataclass
class Session:
    """One run while it lasts: what is trained, where it is written, and by which process."""

    settings: Settings
    output: Path
    rank: Rank
    steps: int
    held_out: Sequence[TextPair]
    say: Callable[..., object]
    encoder: Encoder
    tokenizer: Any
    loss_fn: ContrastiveLoss
    optimizer: torch.optim.Optimizer
    signals: list[int] = field(default_factory=list)

    @property
    def modules(self) -> nn.ModuleDict:
        """All that has parameters, under the names that a checkpoint gives them."""
        return nn.ModuleDict({"encoder": self.encoder, "loss": self.loss_fn})

    @property
    def lengths(self) -> dict[str, int]:
        """What texts are cut to."""
        return {"query_length": self.settings.query_length, "passage_length": self.settings.passage_length}

    def described(self) -> str:
        """The model in words."""
        count = sum(parameter.numel() for parameter in self.encoder.parameters())
        processes = f", {self.rank.world_size} processes" if self.rank.world_size > 1 else ""
        return f"{self.settings.model}, {count:,} parameters on {self.rank.device.type}{processes}"

    def config(self, pairs: Sequence[TextPair]) -> dict[str, Any]:
        """What config.json holds: settings, how many processes and steps, the data's checksum, the versions."""
        digest = hashlib.sha256("\0".join(texts_of(pairs)).encode()).hexdigest()
        return {
            "settings": dataclasses.asdict(self.settings),
            "processes": self.rank.world_size,
            "steps": self.steps,
            "pairs": len(pairs),
            "pairs_sha256": digest,
            "versions": versions(),
        }

    def write_config(self, config: dict[str, Any]) -> None:
        """Begin the folder of a new run."""
        if self.rank.is_first:
            write_atomically(self.output / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    def restore(self, config: dict[str, Any]) -> TrainingState:
        """Weights, optimizer and place in the data as the newest whole checkpoint has them; records cut to that step.

        ValueError where the run's data are others than they were.
        """
        kept = json.loads((self.output / "config.json").read_text("utf-8"))
        if kept["pairs_sha256"] != config["pairs_sha256"]:
            rule = f"must find the {kept['pairs']:,} pairs that the run began with"
            raise refuse("--resume", rule, f"{config['pairs']:,} pairs, or other texts")
        if kept["versions"] != config["versions"]:
            self.say(f"The run began with {kept['versions']}, and goes on with {config['versions']}.")
        checkpoint, damages = latest_checkpoint(self.output)
        for damage in damages:
            self.say(f"Passed over a damaged checkpoint: {damage}.")
        self._cut_lines(0 if checkpoint is None else checkpoint.step)
        if checkpoint is None:
            self.say("No checkpoint to go on from: the run starts again.")
            return TrainingState()
        self.modules.load_state_dict(dict(checkpoint.model))
        load_optimizer_tensors(self.optimizer, checkpoint.optimizer)
        self.say(f"Resumed after step {checkpoint.step}.")
        about = checkpoint.about
        own = [name for name in checkpoint.generators if name.startswith(f"rank{self.rank.rank}.")]
        generators = tuple(checkpoint.generators[name] for name in sorted(own))
        return TrainingState(checkpoint.step, about["epoch"], about["batch"], about["seconds"], generators)

    def train(self, pairs: Sequence[TextPair], state: TrainingState, *, progress: bool) -> list[TrainingRecord]:
        """The steps still to take, with records, evaluations and checkpoints as they are due."""
        settings = self.settings
        with signals_noted(self.signals, alone=self.rank.world_size == 1):
            return train(
                (self.encoder, self.encoder),
                pairs,
                self.tokenizer,
                self.loss_fn,
                step=step_function(settings, self.rank, list(self.modules.values())),
                batch_size=settings.batch_size,
                steps=self.steps,
                optimizer=self.optimizer,
                seed=settings.seed,
                schedule=settings.schedule,
                warmup_steps=settings.warmup_steps,
                clip_norm=settings.clip_norm or None,
                progress=progress,
                start=state,
                on_record=self.write_record,
                on_state=self.after_step,
                rank=self.rank.rank,
                world_size=self.rank.world_size,
                **self.lengths,
            )

    def write_record(self, record: TrainingRecord) -> None:
        """One line more in records.jsonl."""
        if self.rank.is_first:
            append_line(self.output / "records.jsonl", dataclasses.asdict(record))

    def after_step(self, state: TrainingState) -> None:
        """Evaluate and write a checkpoint where they are due; end the training where a signal asks for it."""
        last = state.step == self.steps
        stop = 0 if last else self._agreed_signal()
        if last or is_due(state.step, self.settings.evaluate_every):
            self.evaluate(state.step)
        if last or stop or is_due(state.step, self.settings.checkpoint_every):
            self.write_checkpoint(state)
        if stop:
            raise Stopped(state.step, stop)

    def evaluate(self, step: int) -> None:
        """Does the encoder find the test pairs' passages? One line more in evaluations.jsonl."""
        if self.held_out and self.rank.is_first:
            encoders = (self.encoder, self.encoder)
            metrics = retrieval_metrics(encoders, self.held_out, self.tokenizer, **self.lengths)
            append_line(self.output / "evaluations.jsonl", {"step": step, "pairs": len(self.held_out), **metrics})
            with tqdm.external_write_mode():
                told = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
                self.say(f"Step {step}, {len(self.held_out):,} test pairs: {told}")

    def write_checkpoint(self, state: TrainingState) -> None:
        """Every process gives its generators; the first one writes."""
        generators = self._gathered(state.generators)
        if self.rank.is_first:
            for name in ("records.jsonl", "evaluations.jsonl"):
                flush_to_disk(self.output / name)
            checkpoint = Checkpoint(
                step=state.step,
                model=self.modules.state_dict(),
                optimizer=optimizer_tensors(self.optimizer),
                generators=generators,
                about={"epoch": state.epoch, "batch": state.batch, "seconds": state.seconds, "versions": versions()},
            )
            write_checkpoint(self.output, checkpoint, keep=self.settings.keep)

    def export(self) -> None:
        """The trained encoder as a folder that others load."""
        if self.rank.is_first:
            longest = max(self.lengths.values())
            save_model_folder(self.encoder, self.tokenizer, self.output / "model", max_length=longest)
            self.say(f"Trained: {self.output / 'model'}")

    def _cut_lines(self, step: int) -> None:
        """Leave out what was written after `step`: those steps are taken again."""
        if self.rank.is_first:
            for name in ("records.jsonl", "evaluations.jsonl"):
                lines = read_lines(self.output / name)
                kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
                write_atomically(self.output / name, "".join(kept).encode())

    def _agreed_signal(self) -> int:
        """The signal that any process got, told to all, so that they stop after the same step; 0 for none."""
        got = max(self.signals, default=0)
        if self.rank.world_size == 1:
            return got
        shared = torch.tensor(got, device=self.rank.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared)

    def _gathered(self, generators: Sequence[Tensor]) -> dict[str, Tensor]:
        """The generators' states of all processes, named by rank and place."""
        named = {}
        for place, own in enumerate(generators):
            received = [own]
            if self.rank.world_size > 1:
                own = own.to(self.rank.device)
                received = [torch.empty_like(own) for _ in range(self.rank.world_size)]
                dist.all_gather(received, own)
            named |= {f"rank{number}.{place}": state for number, state in enumerate(received)}
        return named


@contextmanager
def signals_noted(noted: list[int], *, alone: bool) -> Iterator[None]:
    """Inside, Ctrl-C and a request to end are noted and not obeyed; alone, a second Ctrl-C stops at once.

    Under torchrun a signal comes from the terminal and again from torchrun.
    """

    def note(number: int, frame: Any) -> None:
        if noted and alone:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def first_process_first(rank: Rank) -> Iterator[None]:
    """Inside, the first process is done before the others begin: what it mines, they read from the cache."""
    if rank.world_size > 1 and not rank.is_first:
        dist.barrier()
    yield
    if rank.world_size > 1 and rank.is_first:
        dist.barrier()


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def is_due(step: int, every: int) -> bool:
    """Whether something that comes every so many steps (0: never) comes after this one."""
    return every > 0 and step % every == 0


def append_line(path: Path, content: dict[str, Any]) -> None:
    """One JSON object more at the file's end."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The file's JSON objects; none where there is no file, and without a last line that a kill cut short."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def flush_to_disk(path: Path) -> None:
    """See to it that what was written survives a loss of power."""
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        os.fsync(file.fileno())
