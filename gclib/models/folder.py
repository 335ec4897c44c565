"""A trained encoder as a folder that others load: transformers, and sentence-transformers with pooling and length."""

import os
import shutil
from pathlib import Path
from typing import Any

from gclib.models.adapters import is_adapted, name_base
from gclib.models.encoder import Encoder
from gclib.models.sentence_folder import write_sentence_folder
from gclib.support.validation import positive_int, refuse


def save_model_folder(encoder: Encoder, tokenizer: Any, folder: Path, *, max_length: int) -> None:
    """Write model and tokenizer as `save_pretrained` does, and beside them how sentence-transformers pools.

    `Encoder.from_pretrained(folder)` and `SentenceTransformer(folder)` then give the same representations of texts of
    at most `max_length` tokens, with the layers behind the pooling and the prompts that the encoder has. The poolings
    "own" and "tokens" have no name there: such a folder holds model and tokenizer alone, and an encoder with layers
    behind them is refused. Written under another name and renamed; an older folder stands aside until then, and is put
    back by the next call where a kill came between.
    """
    positive_int("max_length", max_length)
    named = encoder.pooling not in ("own", "tokens")
    if encoder.head is not None and not named:
        raise refuse(
            "encoder", f"must not have layers behind pooling {encoder.pooling}, which no folder can keep", "some"
        )
    if is_adapted(encoder):
        name_base(encoder)
    part, aside = (folder.with_name(f".{folder.name}.{which}") for which in ("part", "aside"))
    if aside.exists() and not folder.exists():
        os.rename(aside, folder)
    for left in (part, aside):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    encoder.model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if named:
        write_sentence_folder(part, encoder, max_length)
    if folder.exists():
        os.rename(folder, aside)
    os.rename(part, folder)
    shutil.rmtree(aside, ignore_errors=True)
