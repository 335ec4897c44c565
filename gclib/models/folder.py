"""A trained encoder as a folder that others load: transformers, and sentence-transformers with pooling and length."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from gclib.models.encoder import Encoder
from gclib.support.validation import positive_int

POOLING_NAMES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
MODULES = "sentence_transformers.models"  # where every version since 2 finds its modules


def save_model_folder(encoder: Encoder, tokenizer: Any, folder: Path, *, max_length: int) -> None:
    """Write model and tokenizer as `save_pretrained` does, and beside them how sentence-transformers pools.

    `Encoder.from_pretrained(folder)` and `SentenceTransformer(folder)` then give the same representations of texts of
    at most `max_length` tokens. Poolings other than "mean", "cls" and "last" have no name there: such a folder
    holds model and tokenizer alone. Written under another name and renamed; an older folder is replaced.
    """
    positive_int("max_length", max_length)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    encoder.model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if encoder.pooling in POOLING_NAMES:
        _describe_pooling(encoder, part, max_length)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(part, folder)


def _describe_pooling(encoder: Encoder, folder: Path, max_length: int) -> None:
    """The files that sentence-transformers reads, as its versions since 2 know them."""
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * encoder.normalize
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": number, "name": str(number), "path": paths[number], "type": f"{MODULES}.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    pooling: dict[str, Any] = {"word_embedding_dimension": encoder.model.config.hidden_size}
    for kind, name in POOLING_NAMES.items():
        pooling[f"pooling_mode_{name}"] = kind == encoder.pooling
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    _write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
