"""From a run's settings to its pairs and its `Training`: encoder, tokenizer, loss, optimizer and step."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gclib.data.files import load_own_pairs
from gclib.data.negatives import mine_hard_negatives
from gclib.data.pairs import TextPair, load_pairs
from gclib.data.tokens import check_tokenizer, train_tokenizer
from gclib.distributed import Rank, average_gradients
from gclib.losses.module import ContrastiveLoss
from gclib.models.adapters import LoRA, add_lora
from gclib.models.encoder import Encoder, config_for, pooling_for
from gclib.models.presets import positions_of
from gclib.models.pretrained import check_reads_text, first_line, load_tokenizer
from gclib.models.sentence_folder import find_file
from gclib.steps import accumulation_step, grad_cache_step, naive_step
from gclib.support.validation import one_of, refuse
from gclib.training.chunks import planned_chunks
from gclib.training.loop import Training
from gclib.training.settings import LENGTHS, Settings, flag

MANY = 10**9  # tokens: where a model sets no limit
PROMPTS = "config_sentence_transformers.json"
PASSAGE_PROMPTS = ("document", "passage", "corpus")  # the names under which sentence-transformers looks, in this order


def load_data(settings: Settings, *, progress: bool) -> tuple[list[TextPair], list[TextPair]]:
    """The pairs to train on, with their hard negatives, and those to evaluate on."""
    load = loader(settings, progress=progress)
    pairs = load(split="train", limit=settings.train_pairs)
    held_out = load_held_out(load, settings.test_pairs) if settings.test_pairs else []
    if settings.negatives:
        pairs = mine_hard_negatives(pairs, per_query=settings.negatives, seed=settings.seed)
    if settings.batch_size == 1 and not pairs[0].negatives:
        raise refuse("--batch-size", "must be at least 2 without hard negatives: a query needs a wrong passage", 1)
    if len(pairs) < settings.batch_size:
        raise refuse("--batch-size", f"must be at most the number of pairs, {len(pairs)}", settings.batch_size)
    return pairs, held_out


def loader(settings: Settings, *, progress: bool) -> Callable[..., list[TextPair]]:
    """load(split=, limit=) -> pairs: of the settings' own data, or of the mined corpus."""
    if settings.data is None:
        return functools.partial(load_pairs, progress=progress)

    def load(**which: Any) -> list[TextPair]:
        columns = {"query": settings.query_column, "passage": settings.passage_column}
        try:
            return load_own_pairs(settings.data, **columns, **which)
        except ValueError as error:
            raise ValueError(re.sub(r"^name_or_folder\b", "--data", str(error))) from error

    return load


def load_held_out(load: Callable[..., list[TextPair]], limit: int) -> list[TextPair]:
    """The first pairs of the test split; ValueError where the data have none."""
    try:
        return load(split="test", limit=limit)
    except ValueError as error:
        raise refuse("--test-pairs", f"must be 0 for data without pairs to test on ({error})", limit) from error


def total_steps(settings: Settings, pair_count: int) -> int:
    """Updates of a run over so many pairs: --steps, or the full batches of --epochs."""
    return settings.steps or max(1, settings.epochs * (pair_count // settings.batch_size))


def build(settings: Settings, pairs: Sequence[TextPair], rank: Rank, steps: int | None = None) -> Training:
    """What the settings name, on the process's device: one encoder for both towers, the same in every process.

    steps: the updates, where another number than `total_steps` was settled when the run began.
    """
    steps = steps or total_steps(settings, len(pairs))
    settings = settings.with_rates(steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder, tokenizer = fresh_model(settings, pairs) if settings.is_fresh else saved_model(settings)
        if settings.lora_rank is not None:
            adapt(encoder, settings.lora_rank)
    settings = fitted(settings, encoder, tokenizer)
    check_reads_text(encoder, tokenizer, max(settings.query_length, settings.passage_length), "--model")
    loss_fn = loss_of(settings).to(rank.device)
    encoder.to(rank.device)
    optimizer = optimizer_for(settings, [*encoder.parameters(), *loss_fn.parameters()])
    chunks = {}
    if settings.chunk_size == "auto":
        chunks = planned_chunks(settings, pairs, encoder, loss_fn, optimizer, rank)
        settings = replace(settings, **chunks)
    return Training(
        (encoder, encoder),
        tokenizer,
        loss_fn,
        step=step_function(settings, rank, (encoder, loss_fn)),
        optimizer=optimizer,
        batch_size=settings.batch_size,
        steps=steps,
        seed=settings.seed,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        clip_norm=settings.clip_norm or None,
        query_length=settings.query_length,
        passage_length=settings.passage_length,
        rank=rank.rank,
        world_size=rank.world_size,
        chunks=chunks,
    )


def loss_of(settings: Settings) -> ContrastiveLoss:
    """The loss that the settings name, against the texts of all processes."""
    return ContrastiveLoss(
        settings.temperature,
        learnable=settings.learnable_temperature,
        symmetric=settings.symmetric,
        tile_size=settings.tile_size,
        across="ring" if settings.ring else "gather",
    )


def check_config(settings: Settings) -> None:
    """Refuse, by the model's config alone, before data and weights are loaded, a model that can't take the texts."""
    if settings.is_fresh:
        config = config_for(settings.model, settings.vocab_size, settings.dropout)
        if hasattr(config, "num_channels"):
            raise refuse("--model", "must read text", f"{settings.model}, which reads pictures")
    elif Path(settings.model, "config.json").is_file():
        try:
            config = transformers.AutoConfig.from_pretrained(settings.model)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise refuse("--model", f"must hold a config.json that can be read ({error})", settings.model) from error
    else:
        return
    check_room_for_texts(settings, positions_of(config) or MANY)


def check_room_for_texts(settings: Settings, room: int) -> None:
    """ValueError for texts of more tokens than the model reads."""
    longest = max(settings.query_length or 0, settings.passage_length or 0)
    if longest > room:
        raise refuse("--query-length and --passage-length", f"must be at most the model's {room} tokens", longest)


def fitted(settings: Settings, encoder: Encoder, tokenizer: Any) -> Settings:
    """With the lengths of texts. ValueError for more than the model reads, or so few that a prefix fills them."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        got = f"{settings.model}, whose tokenizer has no words (is its file missing?)"
        raise refuse("--model", "must hold a tokenizer beside the model", got)
    room = min(positions_of(encoder.model.config) or MANY, tokenizer.model_max_length)
    check_room_for_texts(settings, room)
    settings = settings.with_lengths(room)
    for name in LENGTHS:
        check_tokenizer(tokenizer, getattr(settings, name), flag(name))
    for side in ("query", "passage"):
        length, prefix = getattr(settings, f"{side}_length"), getattr(settings, f"{side}_prefix")
        taken = len(tokenizer(prefix)["input_ids"]) if prefix else 0
        if taken >= length:
            rule = f"must leave room for text beside the prefix and special tokens, {taken} tokens"
            raise refuse(f"--{side}-length", rule, length)
    return settings


def with_prompts(settings: Settings) -> Settings:
    """With the prefixes that the model's folder has for queries and passages, where none were typed.

    As sentence-transformers reads them: the prompt "query"; "document", "passage" or "corpus"; else its default.
    """
    prompts = {} if settings.is_fresh else prompts_of(settings.model)
    query = prompts.get("query", prompts.get("default", ""))
    passage = next((prompts[name] for name in (*PASSAGE_PROMPTS, "default") if name in prompts), "")
    return replace(
        settings,
        query_prefix=query if settings.query_prefix is None else settings.query_prefix,
        passage_prefix=passage if settings.passage_prefix is None else settings.passage_prefix,
    )


def prompts_of(name_or_folder: str) -> dict[str, str]:
    """The prompts of config_sentence_transformers.json by name; as "default" the one that is used without a name."""
    try:
        path = find_file(name_or_folder, PROMPTS)
        about = {} if path is None else json.loads(path.read_text("utf-8"))
        prompts = {name: text for name, text in (about.get("prompts") or {}).items() if isinstance(text, str)}
    except (OSError, ValueError, AttributeError) as error:
        rule = f"must hold a {PROMPTS} that can be read, if any ({first_line(error)})"
        raise refuse("--model", rule, name_or_folder) from error
    if about.get("default_prompt_name") in prompts:
        prompts["default"] = prompts[about["default_prompt_name"]]
    return prompts


def prefixed(pairs: Sequence[TextPair], settings: Settings) -> list[TextPair]:
    """The pairs with the prefixes in front: of queries one, of passages and hard negatives the other."""
    query, passage = settings.query_prefix or "", settings.passage_prefix or ""
    if not query and not passage:
        return list(pairs)
    return [
        replace(
            pair,
            query=query + pair.query,
            passage=passage + pair.passage,
            negatives=tuple(passage + text for text in pair.negatives),
        )
        for pair in pairs
    ]


def optimizer_for(settings: Settings, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over what is trained, with weight decay for matrices alone."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def fresh_model(settings: Settings, pairs: Sequence[TextPair]) -> tuple[Encoder, Any]:
    """An encoder with fresh weights, and a tokenizer trained on the pairs."""
    config = config_for(settings.model, settings.vocab_size, settings.dropout)
    tokenizer = train_tokenizer(pairs, vocab_size=config.vocab_size)
    config.pad_token_id = tokenizer.pad_token_id
    encoder = Encoder.from_config(config, pooling=pooling_for(settings.model, settings.pooling))
    if encoder.reads_pictures:
        raise refuse("--model", "must read text", settings.model)
    return encoder, tokenizer


def saved_model(settings: Settings) -> tuple[Encoder, Any]:
    """The encoder and the tokenizer of a folder, or of a name on the hub, to be trained in float32.

    An encoder whose folder compares by cosine, as most do, is normalized, also where the folder does not do it itself.
    """
    try:
        encoder = Encoder.from_pretrained(settings.model, pooling=settings.pooling)
        tokenizer = load_tokenizer(settings.model)
    except ValueError as error:
        raise ValueError(str(error).replace("name_or_folder", "--model", 1)) from error
    similarity = one_of("--model: similarity_fn_name", encoder.rules.similarity, ("cosine", "dot"))
    encoder.normalize = encoder.normalize or similarity == "cosine"
    return encoder, tokenizer


def adapt(encoder: Encoder, rank: int) -> None:
    """Freeze the encoder and put pairs of this rank beside its attention's layers. ValueError where it has some."""
    try:
        add_lora(encoder, LoRA(rank))
    except ValueError as error:
        raise ValueError(f"--lora-rank: {error}") from error


def step_function(settings: Settings, rank: Rank, modules: Sequence[nn.Module]) -> Callable[..., Tensor]:
    """The step as a `Training` takes it: under autocast if asked for, and the gradients averaged over the processes."""
    if settings.step == "naive":
        plain_step = naive_step
    elif settings.step == "accumulation":
        plain_step = functools.partial(accumulation_step, chunk_size=settings.chunk_size)
    else:
        chunks = {"chunk_size": settings.chunk_size, "chunk_tokens": settings.chunk_tokens}
        plain_step = functools.partial(grad_cache_step, **chunks, retain_chunks=settings.retain_chunks)
    kind, enabled = rank.device.type, settings.autocast == "bf16"

    def step(encoders: Sequence[Any], inputs: Sequence[Any], loss_fn: Any) -> Tensor:
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled):
            loss = plain_step(encoders, inputs, loss_fn)
        average_gradients(*modules)
        return loss

    return step
