"""A training run while it lasts: its folder, its checkpoints, its evaluations, and the signals that stop it.

The folder holds config.json (settings, data, versions), records.jsonl (one record a step), evaluations.jsonl,
checkpoint-000100/ (see `gclib.training.checkpoints`) and, at the end, model/. Under torchrun the first process writes.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from gclib.data.pairs import TextPair, texts_of
from gclib.distributed import Rank, all_gather, waiting_for_ranks
from gclib.models.adapters import is_adapted, merged, numbers_trained
from gclib.models.encoder import Encoder
from gclib.models.folder import save_model_folder
from gclib.models.presets import positions_of
from gclib.models.pretrained import tokenizer_text
from gclib.support.files import as_new_files, write_atomically
from gclib.support.validation import refuse
from gclib.support.words import format_table
from gclib.training.build import PASSAGE_PROMPTS, PROMPTS
from gclib.training.checkpoints import (
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_optimizer_tensors,
    optimizer_tensors,
    write_checkpoint,
)
from gclib.training.loop import Training, TrainingRecord, TrainingState, learning_rate_factors
from gclib.training.output import check_new_output, check_room
from gclib.training.retrieval import retrieval_metrics
from gclib.training.settings import Settings, flag

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CONFIG = "config.json"
WATCHED = ("top-1", "mrr")  # what must not be lower at the end
LINES = ("records.jsonl", "evaluations.jsonl")


class StoppedBySignal(Exception):
    """A signal ended the training after a step, and a checkpoint of it is written."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"Stopped after step {step}")
        self.signal_number = signal_number


@dataclass
class Session:
    """One run while it lasts: what is trained, where it is written, and by which process.

    chosen: the settings that nobody typed and that the kind of start decided.
    """

    settings: Settings
    output: Path
    rank: Rank
    training: Training
    held_out: Sequence[TextPair]
    say: Callable[..., object]
    chosen: Sequence[str] = ()
    signals: list[int] = field(default_factory=list)

    @property
    def encoder(self) -> Encoder:
        """The one encoder of both towers."""
        return self.training.encoders[0]

    @property
    def modules(self) -> nn.ModuleDict:
        """All that has parameters, under the names that a checkpoint gives them."""
        return nn.ModuleDict({"encoder": self.encoder, "loss": self.training.loss_fn})

    def state(self, *, frozen: bool = False) -> dict[str, Tensor]:
        """What a checkpoint keeps of the modules, by name: all that is not frozen; or the rest."""
        modules = self.modules
        names = {name for name, parameter in modules.named_parameters() if not parameter.requires_grad}
        return {name: tensor for name, tensor in modules.state_dict().items() if (name in names) == frozen}

    def described(self, pairs: Sequence[TextPair]) -> str:
        """Model, data and steps in words."""
        count = sum(parameter.numel() for parameter in self.encoder.parameters())
        trained = numbers_trained(self.encoder)
        processes = f", {self.rank.world_size} processes" if self.rank.world_size > 1 else ""
        part = "" if trained == count else f", {trained:,} of them trained,"
        model = f"{self.settings.model}, {count:,} parameters{part} on {self.rank.device.type}{processes}"
        data = f"{len(pairs):,} pairs, {self.training.steps:,} steps of {self.training.batch_size} queries"
        start = "fresh" if self.settings.is_fresh else "trained"
        told = [f"a highest rate of {self.settings.learning_rate:g}{self._by_default('learning_rate')}"]
        told.append(f"{self.settings.warmup_steps:,} steps of warm-up{self._by_default('warmup_steps')}")
        prefixes = {"queries": self.settings.query_prefix, "passages": self.settings.passage_prefix}
        told += [f"before {side} stands {prefix!r}" for side, prefix in prefixes.items() if prefix]
        lengths = "queries of {query_length}, passages of {passage_length} tokens".format(**self.training.lengths)
        if "chunk_size" in self.chosen:
            told.append(f"{chunks_in_words(self.settings)}{self._by_default('chunk_size')}")
        texts = f"{self.encoder.in_words()}; {lengths} at most"
        return f"{model}: {data}.\n{texts}.\nFrom {start} weights: {', '.join(told)}."

    def _by_default(self, name: str) -> str:
        return f" (chosen; {flag(name)} sets another)" if name in self.chosen else ""

    def begin(self, pairs: Sequence[TextPair]) -> TrainingState:
        """Make the folder of a new run."""
        config = self._config(pairs)
        self._agree(config, 0)
        if self.rank.is_first:
            check_new_output(self.output)  # again: now it is locked
            check_room(self.output, self.bytes_to_write())
            write_json(self.output / CONFIG, config)
        return TrainingState()

    def restore(self, pairs: Sequence[TextPair]) -> TrainingState:
        """Weights, optimizer and place in the data as the newest whole checkpoint has them; records cut to that step.

        ValueError where the run's data are others than they were.
        """
        saved, config = read_config(self.output), self._config(pairs)
        if saved["pairs_sha256"] != config["pairs_sha256"]:
            rule = f"must find the {saved['pairs']:,} pairs that the run began with"
            raise refuse("--resume", rule, f"{config['pairs']:,} pairs, or other texts")
        if saved["tokenizer_sha256"] != config["tokenizer_sha256"]:
            raise refuse("--resume", "must get the tokenizer that the run began with", "another vocabulary")
        if saved.get("frozen_sha256", config["frozen_sha256"]) != config["frozen_sha256"]:
            raise refuse("--resume", "must find the frozen weights that the run began with", "others")
        if saved["versions"] != config["versions"]:
            self.say(f"The run began with {saved['versions']}, and goes on with {config['versions']}.")
        checkpoint, damages = latest_checkpoint(self.output)
        for damage in damages:
            self.say(f"Passed over a damaged checkpoint: {damage}.")
        step = 0 if checkpoint is None else checkpoint.step
        if step > self.training.steps:
            rule = f"must lead to {step} steps or more, which are taken already"
            raise refuse("--steps or --epochs", rule, f"{self.training.steps} steps")
        self._agree(config, step)
        if self.rank.is_first:
            check_room(self.output, self.bytes_to_write())
            if config["steps"] != saved["steps"]:
                self.say(self._described_change(saved, step))
                write_json(self.output / CONFIG, {**saved, **{n: config[n] for n in ("settings", "steps")}})
        self._cut_lines(-1 if checkpoint is None else step)
        if checkpoint is None:
            self.say("No checkpoint to go on from: the run starts again.")
            return TrainingState()
        self.say(f"Resumed after step {step}.")
        return self._restored(checkpoint)

    def train(self, pairs: Sequence[TextPair], state: TrainingState, *, progress: bool) -> list[TrainingRecord]:
        """The steps still to take, with records, evaluations and checkpoints as they are due."""
        if state.step == 0:
            self.evaluate(0)
        hooks = {"on_record": self.write_record, "on_state": self.after_step}
        with signals_noted(self.signals, alone=self.rank.world_size == 1):
            return self.training.run(pairs, start=state, progress=progress, **hooks)

    def write_record(self, record: TrainingRecord) -> None:
        """One line more in records.jsonl."""
        if self.rank.is_first:
            append_line(self.output / "records.jsonl", dataclasses.asdict(record))

    def after_step(self, state: TrainingState) -> None:
        """Evaluate and write a checkpoint where they are due; end the training where a signal asks for it."""
        last = state.step == self.training.steps
        stop = 0 if last else self._agreed_signal()
        if last or is_due(state.step, self.settings.evaluate_every):
            self.evaluate(state.step)
        if last or stop or is_due(state.step, self.settings.checkpoint_every):
            self.write_checkpoint(state)
        if stop:
            raise StoppedBySignal(state.step, stop)

    def evaluate(self, step: int) -> None:
        """Does the encoder find the test pairs' passages? One line more in evaluations.jsonl."""
        if self.held_out and self.rank.is_first:
            training = self.training
            metrics = retrieval_metrics(training.encoders, self.held_out, training.tokenizer, **training.lengths)
            append_line(self.output / "evaluations.jsonl", {"step": step, "pairs": len(self.held_out), **metrics})
            with tqdm.external_write_mode():
                values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
                self.say(f"Step {step}, {len(self.held_out):,} test pairs: {values}")

    def write_checkpoint(self, state: TrainingState) -> None:
        """Every process gives its generators; the first one writes."""
        generators = self._gathered(state.generators)
        if self.rank.is_first:
            for name in LINES:
                flush_to_disk(self.output / name)
            checkpoint = Checkpoint(
                step=state.step,
                model=self.state(),
                optimizer=optimizer_tensors(self.training.optimizer),
                generators=generators,
                about={"epoch": state.epoch, "batch": state.batch, "seconds": state.seconds, "versions": versions()},
            )
            write_checkpoint(self.output, checkpoint, keep=self.settings.keep)

    def export(self) -> None:
        """The trained encoder as a folder that others load, model/; adapters merged there, and alone in adapter/."""
        if self.rank.is_first:
            limits = [self.encoder.rules.max_length, positions_of(self.encoder.model.config)]
            longest = min(n for n in limits if n) if limits[0] else max(self.training.lengths.values())
            encoders = {"model": self.encoder}
            if is_adapted(self.encoder):
                encoders = {"adapter": self.encoder, "model": merged(self.encoder)}
            for name, encoder in encoders.items():
                save_model_folder(encoder, self.training.tokenizer, self.output / name, max_length=longest)
                self._write_prompts(self.output / name / PROMPTS)
                as_new_files(self.output / name)
            self.say(f"Trained: {', '.join(str(self.output / name) for name in encoders)}")

    def _write_prompts(self, path: Path) -> None:
        """The prefixes as sentence-transformers' prompts, beside those that are there."""
        about = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        prompts_there = about.get("prompts") or {}
        names = [name for name in PASSAGE_PROMPTS if name in prompts_there] or [PASSAGE_PROMPTS[0]]
        prompts = {
            "query": self.settings.query_prefix or "",
            **dict.fromkeys(names, self.settings.passage_prefix or ""),
        }
        if prompts_there or any(prompts.values()):
            write_json(path, {**about, "prompts": {**prompts_there, **prompts}})

    def compare(self) -> None:
        """What the test pairs said before the first step beside the last; a warning where the run went down."""
        if not (self.held_out and self.rank.is_first):
            return
        lines = read_lines(self.output / "evaluations.jsonl")
        if not lines:
            return  # a run that had ended before it was given test pairs
        first, last = lines[0], lines[-1]
        if first["step"] or not last["step"] or first["pairs"] != last["pairs"]:
            return  # begun before the first evaluation was kept, or resumed with other test pairs
        names = [name for name in first if name in last and name not in ("step", "pairs")]
        rows = [[name, f"{first[name]:.3f}", f"{last[name]:.3f}"] for name in names]
        self.say(format_table([f"{last['pairs']:,} test pairs", "before", f"after step {last['step']:,}"], rows))
        worse = [f"{name} from {first[name]:.3f} to {last[name]:.3f}" for name in WATCHED if last[name] < first[name]]
        if worse:
            self.say(
                f"Warning: the model is worse than it was before the training: {', '.join(worse)}. The loss may have "
                "fallen all the same. Try a lower --learning-rate, more --warmup-steps, fewer steps, or data that are "
                "nearer to what is tested."
            )

    def bytes_to_write(self) -> int:
        """What checkpoints and model will take on the disk, beside what is there."""
        weights = sum(tensor.nbytes for tensor in self.state().values())
        whole = weights + sum(tensor.nbytes for tensor in self.state(frozen=True).values())
        remembered = 2 * sum(p.nbytes for group in self.training.optimizer.param_groups for p in group["params"])
        written = math.ceil(self.training.steps / (self.settings.checkpoint_every or self.training.steps))
        held = min(written, self.settings.keep + 1)  # a new one is whole before the oldest goes
        coming = max(1, held - len(list_checkpoints(self.output)))
        return coming * (weights + remembered) + whole

    def _described_change(self, saved: Mapping[str, Any], step: int) -> str:
        """Whether a run of another length goes on to the numbers that it would have had from the start."""
        before, now, settings = saved["steps"], self.training.steps, self.settings
        warmup = settings.warmup_steps
        if "warmup_steps" in saved.get("chosen", ()):
            warmup = dataclasses.replace(settings, warmup_steps=None).with_rates(now).warmup_steps
        taken, other = (
            learning_rate_factors(steps, warmup_steps=min(rise, steps), schedule=settings.schedule)[:step]
            for steps, rise in ((before, settings.warmup_steps), (now, warmup))
        )
        told = f"The run was begun as one of {before:,} steps and goes on as one of {now:,}"
        if taken == other:
            return f"{told}, to the same numbers as one of {now:,} from the start."
        return (
            f"{told}. Its rates depend on that number ({settings.schedule}, {settings.warmup_steps:,} steps of "
            f"warm-up): the {step:,} steps taken had those of {before:,} steps, so the numbers are not those of a run "
            f"of {now:,} steps from the start."
        )

    def _config(self, pairs: Sequence[TextPair]) -> dict[str, Any]:
        """What config.json holds: settings, how many processes and steps, the data's checksum, the versions."""
        vocabulary = tokenizer_text(self.training.tokenizer)
        return {
            "settings": dataclasses.asdict(self.settings),
            "chosen": list(self.chosen),
            "processes": self.rank.world_size,
            "steps": self.training.steps,
            "pairs": len(pairs),
            "pairs_sha256": hashlib.sha256("\0".join(texts_of(pairs)).encode()).hexdigest(),
            "tokenizer_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "frozen_sha256": digest_of(self.state(frozen=True)),  # no checkpoint keeps these
            "versions": versions(),
        }

    def _agree(self, config: Mapping[str, Any], step: int) -> None:
        """ValueError, in every process, unless all begin with the same data, tokenizer, settings and step."""
        digest = hashlib.sha256(json.dumps([config, step], sort_keys=True).encode()).digest()
        digests = self._from_all(torch.tensor(list(digest), dtype=torch.uint8), "what is trained on")
        others = [number for number, other in enumerate(digests) if not torch.equal(other, digests[0])]
        if others:
            rule = "must all have the same pairs, tokenizer, frozen weights, versions, settings and checkpoint"
            raise refuse("the processes", rule, f"others than process 0's in {others}")

    def _restored(self, checkpoint: Checkpoint) -> TrainingState:
        self.modules.load_state_dict({**self.state(frozen=True), **checkpoint.model})
        load_optimizer_tensors(self.training.optimizer, checkpoint.optimizer)
        own = sorted(name for name in checkpoint.generators if name.startswith(f"rank{self.rank.rank}."))
        generators = tuple(checkpoint.generators[name] for name in own)
        about = checkpoint.about
        return TrainingState(checkpoint.step, about["epoch"], about["batch"], about["seconds"], generators)

    def _cut_lines(self, step: int) -> None:
        """Leave out what was written after `step`: those steps are taken again."""
        if self.rank.is_first:
            for name in LINES:
                lines = [line for line in read_lines(self.output / name) if line["step"] <= step]
                write_atomically(self.output / name, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _agreed_signal(self) -> int:
        """The signal that any process got, told to all, so that they stop after the same step; 0 for none."""
        return int(max(self._from_all(torch.tensor(max(self.signals, default=0)), "whether to stop")))

    def _gathered(self, generators: Sequence[Tensor]) -> dict[str, Tensor]:
        """The generators' states of all processes, named by rank and place."""
        states = [self._from_all(own, "a checkpoint's generators") for own in generators]
        return {f"rank{n}.{place}": state for place, of_ranks in enumerate(states) for n, state in enumerate(of_ranks)}

    def _from_all(self, own: Tensor, subject: str) -> list[Tensor]:
        """Every process's tensor, in the order of their ranks."""
        if self.rank.world_size == 1:
            return [own]
        own = own.to(self.rank.device)
        received = [torch.empty_like(own) for _ in range(self.rank.world_size)]
        with waiting_for_ranks(subject):
            all_gather(received, own)
        return received


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


def chunks_in_words(settings: Settings) -> str:
    """How a batch is cut."""
    by, value = ("rows", settings.chunk_size) if settings.chunk_tokens is None else ("tokens", settings.chunk_tokens)
    return f"chunks of {value:,} {by}, {settings.retain_chunks:,} at most encoded once"


def read_config(output: Path) -> dict[str, Any]:
    """What config.json of a run holds; ValueError where there is none, or none that can be read."""
    path = output / CONFIG
    if not path.is_file():
        raise refuse("--resume", "must be given with the --output of a run", f"{output}, which holds no {CONFIG}")
    try:
        config = json.loads(path.read_text("utf-8"))
        config["settings"] = as_it_was(config["settings"])
        Settings(**config["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise refuse("--resume", f"must find a {CONFIG} that this version can read ({error})", str(path)) from error
    return config


def as_it_was(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, of one begun before there were prefixes too: none were put, and the mean was taken."""
    if "query_prefix" in settings:
        return settings
    pooling = settings["pooling"] if Settings(**settings).is_fresh else settings["pooling"] or "mean"
    return {**settings, "query_prefix": "", "passage_prefix": "", "pooling": pooling}


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def is_due(step: int, every: int) -> bool:
    """Whether something that comes every so many steps (0: never) comes after this one."""
    return every > 0 and step % every == 0


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The file anew, all of it or nothing."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def append_line(path: Path, content: dict[str, Any]) -> None:
    """One JSON object more at the file's end."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The file's JSON objects; none where there is no file, and without a last line that a kill cut short.

    ValueError for a line that is none.
    """
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    contents = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                contents.append(json.loads(line))
            except ValueError as error:
                raise refuse(
                    f"{path}, line {number},", "must be a JSON object, as a run writes it", line[:80]
                ) from error
    return contents


def flush_to_disk(path: Path) -> None:
    """See to it that what was written survives a loss of power."""
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        os.fsync(file.fileno())


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of tensors and their names; "" for none."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest() if tensors else ""
