"""Checkpoints that a kill can't spoil: safetensors and JSON in a folder, whole or not there, checked when read.

A checkpoint is a folder checkpoint-000100/ (the number is the step's) of `model.safetensors`, `optimizer.safetensors`,
`generators.safetensors` and `state.json`, which holds the checksums of the others and its own. It is written under
another name, flushed to the disk, then renamed: a half-written one is never read. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from gclib.support.files import DamagedFile, as_new_files
from gclib.support.validation import int_at_least, positive_int, refuse

FORMAT = 1
GROUPS = ("model", "optimizer", "generators")
PART = ".part"  # what a folder's name ends with while it is written or removed
ASIDE = ".aside"  # and while another of its step takes its place


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a training goes on from after `step`: named tensors, and what JSON can hold in `about`."""

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    generators: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int | None = None) -> Path:
    """Write it into `folder` under its step's name, and return that path; all of it or nothing.

    keep: then remove all but the newest so many up to this step (later ones are what a resumed run passed over). An
    older checkpoint of the same step is replaced. Costs a copy of the tensors on the CPU, one group at a time. Raises
    ValueError for a step below 0, or a `keep` below 1.
    """
    final = folder / f"checkpoint-{int_at_least('step', checkpoint.step, 0):06d}"
    if keep is not None:
        positive_int("keep", keep)
    part = final.with_name(f".{final.name}{PART}")
    known = list_checkpoints(folder)
    for left in folder.glob(".checkpoint-*"):
        if left.suffix in (PART, ASIDE) and left not in known:
            _remove(left)
    try:
        _write_part(part, checkpoint)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # on a full disk it would take the room that is missing
        raise
    aside = final.with_name(f".{final.name}{ASIDE}")
    if final.exists():
        os.rename(final, aside)
    os.rename(part, final)
    _flush_folder(folder)
    _remove(aside)
    if keep is not None:
        found = list_checkpoints(folder)
        for old in found[: found.index(final) + 1][:-keep]:
            _remove(old)
    return final


def _write_part(part: Path, checkpoint: Checkpoint) -> None:
    """All files of the checkpoint, on the disk. OSError where they can't be written."""
    part.mkdir(parents=True)
    for group in GROUPS:
        try:
            save_file(_separate(getattr(checkpoint, group)), part / f"{group}.safetensors")
        except SafetensorError as error:
            raise OSError(f"{part / group}.safetensors can't be written: {error}") from error
    digests = {f"{group}.safetensors": _flushed_digest(part / f"{group}.safetensors") for group in GROUPS}
    state = {"format": FORMAT, "step": checkpoint.step, "about": dict(checkpoint.about), "sha256": digests}
    (part / "state.json").write_text(json.dumps({**state, "own_sha256": _digest_of(state)}, indent=2) + "\n", "utf-8")
    _flushed_digest(part / "state.json")
    as_new_files(part)
    _flush_folder(part)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint, its tensors on the CPU. `DamagedFile` says what is missing, cut or changed."""
    state = _read_state(path)
    for name, digest in state["sha256"].items():
        if not (path / name).is_file():
            raise DamagedFile(f"{path.name}: {name} is missing")
        if _digest(path / name) != digest:
            raise DamagedFile(f"{path.name}: {name} does not match its checksum")
    tensors = {group: load_file(path / f"{group}.safetensors") for group in GROUPS}
    return Checkpoint(step=state["step"], about=state["about"], **tensors)


def list_checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, the oldest first; those being written are not among them.

    One that was put aside counts where a kill came before another of its step had its name.
    """
    named = {}
    for path in (*folder.glob(f".checkpoint-*{ASIDE}"), *folder.glob("checkpoint-*")):
        number = path.name.removeprefix(".").removeprefix("checkpoint-").removesuffix(ASIDE)
        if number.isdigit():
            named[number] = path
    return [named[number] for number in sorted(named, key=int)]


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest that is whole, or None; and for each damaged one that was passed over, what is wrong with it."""
    damages = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(path), damages
        except DamagedFile as damage:
            damages.append(str(damage))
    return None, damages


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers, as {"3.exp_avg": ...}: the parameter's number, then the name.

    ValueError for an optimizer that remembers anything but tensors.
    """
    named: dict[str, Tensor] = {}
    for number, remembered in optimizer.state_dict()["state"].items():
        for name, value in remembered.items():
            if not isinstance(value, Tensor):
                raise refuse("optimizer", "must remember nothing but tensors", f"{name}, a {type(value).__name__}")
            named[f"{number}.{name}"] = value
    return named


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer back what `optimizer_tensors` took; its learning rates and other options stay its own."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _read_state(path: Path) -> dict[str, Any]:
    """state.json, checked against its own checksum."""
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        whole = state.pop("own_sha256") == _digest_of(state) and set(state) == {"format", "step", "about", "sha256"}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedFile(f"{path.name}: state.json can't be read") from error
    if not whole:
        raise DamagedFile(f"{path.name}: state.json does not match its own checksum")
    if state["format"] != FORMAT:
        raise DamagedFile(f"{path.name}: of format {state['format']}, and this gclib reads format {FORMAT}")
    return state


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with bytes of its own: safetensors keeps no two names for one storage."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        separate[name] = own
    return separate


def _digest_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flushed_digest(path: Path) -> str:
    """The file's checksum, once its bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return _digest(path)


def _flush_folder(folder: Path) -> None:
    """Put a rename on the disk, where folders can be opened (Windows keeps them by itself)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    """Remove a folder; under another name first, so that half of it is never taken for a checkpoint."""
    if path.exists():
        if not path.name.endswith(PART):
            part = path.with_name(f".{path.name.removeprefix('.')}.old{PART}")
            shutil.rmtree(part, ignore_errors=True)
            path = path.rename(part)
        shutil.rmtree(path)
