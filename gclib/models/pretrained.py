"""Pretrained weights, and whether a tokenizer fits them: what goes wrong with models from the field is refused here."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from gclib.models.adapters import base_of, load_adapter
from gclib.models.presets import model_class
from gclib.models.sentence_folder import SentenceFolder, TextRules, find_file, read_sentence_folder
from gclib.support.modules import training_mode
from gclib.support.validation import refuse

LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError, SafetensorError)
A_FOLDER = "must be a folder that save_pretrained wrote, or a name that can be downloaded"
PROBE_TOKENS = 8
WHERE = {"trust_remote_code": False}  # nothing that is downloaded is executed


def described_folder(place: str, argument: str) -> SentenceFolder:
    """What the folder says; without a modules.json: nothing, and its vectors are normalized."""
    try:
        sentence = read_sentence_folder(place)
    except OSError as error:
        raise refuse(argument, f"{A_FOLDER} ({first_line(error)})", place) from error
    return sentence or SentenceFolder("", "", (), True, TextRules())


def load_model(place: str, subfolder: str, dtype: torch.dtype | None, argument: str) -> tuple[nn.Module, bool, bool]:
    """The model that a folder or a name on the hub holds; whether it has a projection; whether its pooler is fresh.

    An adapter comes with its base. ValueError, naming the argument, where there is none, where weights are missing or
    quantized.
    """
    from transformers import AutoConfig

    where = {"subfolder": subfolder, **WHERE}
    try:
        adapter = find_file(place, f"{subfolder}/adapter_config.json" if subfolder else "adapter_config.json")
        config = None if adapter else AutoConfig.from_pretrained(place, **where)
    except LOADING_ERRORS as error:
        raise refuse(argument, f"{A_FOLDER} ({first_line(error)})", place) from error
    if adapter:
        return _load_adapted(place, subfolder, dtype, argument)
    if quantized := getattr(config, "quantization_config", None):
        raise refuse(argument, "must hold weights that can be trained, not quantized ones", str(quantized))
    try:
        projected = next(iter(config.architectures or ()), "").endswith("WithProjection")
        options = {"config": config, "dtype": "auto" if dtype is None else dtype, "output_loading_info": True, **where}
        model, about = model_class(config).from_pretrained(place, **options)
    except LOADING_ERRORS as error:
        raise refuse(argument, f"must hold a model that can be loaded ({first_line(error)})", place) from error
    missing = [name for name in sorted(about["missing_keys"]) if "pooler" not in name.split(".")]
    if missing:
        rule = f"must hold all weights of its {type(model).__name__}: {len(missing)} are missing, such as {missing[0]}"
        raise refuse(argument, rule, place)
    return model, projected, bool(about["missing_keys"])


def _load_adapted(place: str, subfolder: str, dtype: torch.dtype | None, argument: str) -> tuple[nn.Module, bool, bool]:
    """`load_model` of the adapter's base, with the adapter in it."""
    names = ("adapter_config.json", "adapter_model.safetensors", "config.json")
    about, weights, config = (find_file(place, f"{subfolder}/{name}" if subfolder else name) for name in names)
    base = base_of(about, argument)
    if weights is None:
        raise refuse(argument, "must hold its adapter as adapter_model.safetensors (others may be pickled)", place)
    if config is not None:
        raise refuse(argument, "must hold a model or an adapter, and not both", place)
    model, projected, fresh_pooler = load_model(base, described_folder(base, argument).weights, dtype, argument)
    try:
        missing = load_adapter(model, about.parent)
    except LOADING_ERRORS as error:
        raise refuse(argument, f"must hold an adapter that can be loaded ({first_line(error)})", place) from error
    if missing:
        rule = f"must hold all weights of its adapter: {len(missing)} are missing, such as {missing[0]}"
        raise refuse(argument, rule, place)
    return model, projected, fresh_pooler


def load_tokenizer(name_or_folder: str | Path, argument: str = "name_or_folder") -> Any:
    """The tokenizer beside a model, made to follow the folder's rules of length and case. ValueError for none."""
    from transformers import AutoTokenizer

    place = str(name_or_folder)
    sentence = described_folder(place, argument)
    rules = sentence.rules
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, subfolder=sentence.weights, **WHERE)
    except LOADING_ERRORS as error:
        raise refuse(argument, f"must hold a tokenizer beside the model ({first_line(error)})", place) from error
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 2:  # made up, for want of a file
        raise refuse(argument, "must hold a tokenizer beside the model", f"one without a vocabulary in {place}")
    if rules.max_length is not None:
        tokenizer.model_max_length = rules.max_length
    if rules.lower_case:
        _lower_case(tokenizer, argument)
    return tokenizer


def _lower_case(tokenizer: Any, argument: str) -> None:
    from tokenizers import normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refuse(argument, "must not say do_lower_case of a tokenizer written in Python", type(tokenizer).__name__)
    present = backend.normalizer
    parts = list(present) if isinstance(present, normalizers.Sequence) else [present] * (present is not None)
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])


def tokenizer_text(tokenizer: Any) -> str:
    """All that decides a fast tokenizer's tokens, as a text; of one written in Python its class and vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend.to_str()
    return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])


def check_reads_text(encoder: nn.Module, tokenizer: Any, length: int, argument: str = "encoder") -> None:
    """ValueError unless the encoder takes all the tokenizer's tokens, in rows of `length`, and gives finite vectors.

    One forward of two rows, the second half padding: as long as `length` where positions come from a table, else short.
    """
    table = any(isinstance(part, nn.Embedding) and "pos" in name for name, part in encoder.named_modules())
    width = length if table else min(length, PROBE_TOKENS)
    _check_token_types(tokenizer, argument)
    last = max(tokenizer.get_vocab().values()) if getattr(tokenizer, "is_fast", False) else len(tokenizer) - 1
    ids, mask = torch.full((2, width), last), torch.ones(2, width, dtype=torch.long)
    mask[1, width - width // 2 :] = 0
    ids[mask == 0] = tokenizer.pad_token_id
    device = next(encoder.parameters()).device
    try:
        with torch.no_grad(), training_mode([encoder], False), torch.random.fork_rng(devices=[]):
            reps = encoder(ids.to(device), mask.to(device))
    except Exception as error:
        room = getattr(_token_table(encoder), "num_embeddings", last + 1)
        if last >= room:
            rule = f"must have a row for each token: its tokenizer's go to number {last}, its table has {room} rows"
            raise refuse(argument, f"{rule} (resize_token_embeddings makes more)", "too few") from error
        rule = "must encode texts, from token ids and an attention mask alone"
        raise refuse(argument, rule, f"{type(error).__name__}: {first_line(error)}") from error
    if reps.ndim != 2 + (getattr(encoder, "pooling", "") == "tokens") or reps.shape[0] != 2:
        raise refuse(argument, "must give one vector a text", f"shape {tuple(reps.shape)}")
    if not reps.isfinite().all():
        raise refuse(argument, "must give finite numbers: its weights hold others, or overflow", "NaN or infinity")


def _token_table(encoder: nn.Module) -> nn.Module | None:
    try:
        return encoder.model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _check_token_types(tokenizer: Any, argument: str) -> None:
    """We give no token types: a model whose tokenizer numbers those of one text otherwise than 0 would read another."""
    if "token_type_ids" in getattr(tokenizer, "model_input_names", ()):
        types = copy.deepcopy(tokenizer)("a").get("token_type_ids", [0])
        if any(types):
            raise refuse(argument, "must read a single text with token types of 0", str(types))


def first_line(error: BaseException) -> str:
    """An error's first line, for another one's words."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
