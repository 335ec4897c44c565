"""Where the knobs of a big batch are in public libraries: one table, read from their documentation and code.

Sources: the documentation of sentence-transformers 6.2 (CachedMultipleNegativesRankingLoss) and of transformers'
TrainingArguments; the READMEs and code of GradCache, open_clip, tevatron and PyLate (CachedContrastive).
"""

LIBRARIES = ("gclib", "sentence-transformers", "GradCache", "open_clip", "tevatron", "PyLate")
NONE = "–"
_PER_DEVICE = "`per_device_train_batch_size`"

# what it is -> where each of LIBRARIES keeps it
KNOBS: dict[str, tuple[str, ...]] = {
    "batch of a rank (queries of one loss)": (
        "`train`'s `batch_size` / W",
        _PER_DEVICE,
        "the rows handed to `cache_step`",
        "`--batch-size` × `--accum-freq`",
        "`--per_device_train_batch_size`",
        _PER_DEVICE,
    ),
    "chunk (rows encoded at once)": (
        "`chunk_size`",
        "`mini_batch_size`",
        "`chunk_sizes`",
        "`--batch-size`",
        "`--gc_q_chunk_size`, `--gc_p_chunk_size`",
        "`mini_batch_size`",
    ),
    "chunk in tokens": ("`chunk_tokens`", "`mini_batch_num_tokens`", NONE, NONE, NONE, NONE),
    "gradient cache on": (
        "`grad_cache_step`",
        "the losses named Cached…",
        "always",
        "`--accum-freq` above 1",
        "`--grad_cache`",
        "`CachedContrastive`",
    ),
    "pieces of the loss": ("`tile_size`", "rows of `mini_batch_size`", NONE, NONE, NONE, "`score_mini_batch_size`"),
    "temperature": (
        "`temperature`",
        "`scale` = 1 / temperature",
        "in your loss",
        "learned `logit_scale`",
        "`--temperature`",
        "`temperature`",
    ),
    "passages of other ranks": (
        '`across="gather"` or `across="ring"`',
        "`gather_across_devices`",
        "its distributed loss",
        "always; their gradient: `--gather-with-grad`, with `--local-loss`",
        "always, under DDP",
        "`gather_across_devices`",
    ),
    "losses that don't see each other, added up": (
        "`accumulation_step`",
        "`gradient_accumulation_steps` (transformers)",
        "calls of `cache_step`",
        NONE,
        "`--gradient_accumulation_steps` (transformers)",
        "`gradient_accumulation_steps` (transformers)",
    ),
}


def knob_table() -> str:
    """The knobs as a Markdown table, a column a library."""
    rows = [("what it is", *LIBRARIES), ("---",) * (1 + len(LIBRARIES))]
    rows += [(what, *places) for what, places in KNOBS.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
