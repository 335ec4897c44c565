"""From a run's settings to its pairs and its `Training`: encoder, tokenizer, loss, optimizer and step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gclib.data.files import load_own_pairs
from gclib.data.negatives import mine_hard_negatives
from gclib.data.pairs import TextPair, load_pairs
from gclib.data.tokens import check_tokenizer, train_tokenizer
from gclib.distributed import Rank, average_gradients
from gclib.losses.module import ContrastiveLoss
from gclib.models.encoder import Encoder, config_for, pooling_for
from gclib.models.presets import positions_of
from gclib.models.pretrained import check_reads_text, load_tokenizer
from gclib.steps import accumulation_step, grad_cache_step, naive_step
from gclib.support.validation import one_of, refuse
from gclib.training.loop import Training
from gclib.training.settings import DEFAULTS, Settings, flag


def load_data(settings: Settings, *, progress: bool) -> tuple[list[TextPair], list[TextPair]]:
    """The pairs to train on, with their hard negatives, and those to evaluate on."""
    if settings.data is None:
        load = functools.partial(load_pairs, progress=progress)
    else:
        columns = {"query": settings.query_column, "passage": settings.passage_column}
        load = functools.partial(load_own_pairs, settings.data, **columns)
    pairs = load(split="train", limit=settings.train_pairs)
    held_out = load_held_out(load, settings.test_pairs) if settings.test_pairs else []
    if settings.negatives:
        pairs = mine_hard_negatives(pairs, per_query=settings.negatives, seed=settings.seed)
    if len(pairs) < settings.batch_size:
        raise refuse("--batch-size", f"must be at most the number of pairs, {len(pairs)}", settings.batch_size)
    return pairs, held_out


def load_held_out(load: Callable[..., list[TextPair]], limit: int) -> list[TextPair]:
    """The first pairs of the test split; ValueError where the data have none."""
    try:
        return load(split="test", limit=limit)
    except ValueError as error:
        raise refuse("--test-pairs", f"must be 0 for data without pairs to test on ({error})", limit) from error


def build(settings: Settings, pairs: Sequence[TextPair], rank: Rank) -> Training:
    """What the settings name, on the process's device: one encoder for both towers, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder, tokenizer = fresh_model(settings, pairs) if settings.is_fresh else saved_model(settings)
    lengths = text_lengths(settings, encoder, tokenizer)
    check_reads_text(encoder, tokenizer, max(lengths.values()), "--model")
    loss_fn = ContrastiveLoss(
        settings.temperature,
        learnable=settings.learnable_temperature,
        symmetric=settings.symmetric,
        tile_size=settings.tile_size,
        across="ring" if settings.ring else "gather",
    )
    encoder.to(rank.device)
    loss_fn.to(rank.device)
    return Training(
        (encoder, encoder),
        tokenizer,
        loss_fn,
        step=step_function(settings, rank, (encoder, loss_fn)),
        optimizer=optimizer_for(settings, [*encoder.parameters(), *loss_fn.parameters()]),
        batch_size=settings.batch_size,
        steps=settings.steps or max(1, settings.epochs * (len(pairs) // settings.batch_size)),
        seed=settings.seed,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        clip_norm=settings.clip_norm or None,
        **lengths,
        rank=rank.rank,
        world_size=rank.world_size,
    )


def optimizer_for(settings: Settings, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, with weight decay for matrices alone."""
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


def text_lengths(settings: Settings, encoder: Encoder, tokenizer: Any) -> dict[str, int]:
    """What queries and passages are cut to: the settings' lengths, a default one the model's where that is less."""
    lengths = {name: getattr(settings, name) for name in ("query_length", "passage_length")}
    room = min(positions_of(encoder.model.config) or tokenizer.model_max_length, tokenizer.model_max_length)
    for name, length in lengths.items():
        if length > room and length != DEFAULTS[name]:
            raise refuse("--query-length and --passage-length", f"must be at most the model's {room} tokens", length)
        lengths[name] = min(length, room)
        check_tokenizer(tokenizer, lengths[name], flag(name))
    return lengths


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
