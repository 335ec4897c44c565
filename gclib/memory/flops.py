"""What a step costs: its floating point operations, exactly, and its time against the naive step's, nearly.

FLOPs are those of matrix products and attention, as `torch.utils.flop_counter` counts them: a product of (m, k) and
(k, n) is 2 m k n of them. An encoder's are linear in the rows and a parabola in the width T, because attention looks at
pairs of tokens; so a few counts of tiny batches, with fake tensors, give the FLOPs of every step, to the last one.

Letters: B queries, N passages, D dimensions, T tokens, C rows of a chunk, R retained chunks; rho = tokens of one
forward of all chunks / tokens of the padded batch; r = the share of the former that stands in retained chunks.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop, shape_wrapper

from gclib.chunks import Chunk, check_plan, plan_chunks, price_of_a_call, schedule
from gclib.memory.depth import over_depth
from gclib.memory.fake_modules import FakeMode, fake_copy, padded_tokens
from gclib.memory.ledger import ASKED_DEVICE, UncompiledMode
from gclib.support.validation import int_at_least, one_of, positive_int, positive_number, refuse
from gclib.towers import as_tower_list

WIDTHS = (4, 8, 12, 20)  # three for the parabola, one to see whether it holds
# The CPU's own attention kernel, which torch's counter does not know, costs what the other fused kernels do.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop.__wrapped__,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop.__wrapped__,
}


@dataclass(frozen=True)
class FlopsLaw:
    """FLOPs of one row of T tokens: constant + per_token * T + per_pair * T^2."""

    constant: int = 0
    per_token: int = 0
    per_pair: int = 0

    @classmethod
    def through(cls, flops: Mapping[int, int]) -> "FlopsLaw":
        """The parabola through {width: FLOPs of one row}, at least four widths.

        Raises ValueError where the values do not all lie on one parabola with whole coefficients.
        """
        (u, fu), (v, fv), (w, fw), *rest = sorted(flops.items())
        if not rest:
            raise refuse("flops", "must hold at least four widths", sorted(flops))
        slope = (fv - fu) // (v - u)
        per_pair = ((fw - fv) // (w - v) - slope) // (w - u)
        per_token = slope - per_pair * (u + v)
        law = cls(fu - per_token * u - per_pair * u * u, per_token, per_pair)
        if off := [width for width, count in flops.items() if law.at(1, width) != count]:
            raise refuse("flops", "must lie on one parabola in the width", f"others at the widths {off}")
        return law

    def at(self, rows: int, width: int) -> int:
        """FLOPs of `rows` rows of `width` tokens."""
        return rows * (self.constant + self.per_token * width + self.per_pair * width * width)


@dataclass(frozen=True)
class EncoderCost:
    """The laws of an encoder's forward and of its backward (zero where nothing is trained), and its D dimensions."""

    forward: FlopsLaw
    backward: FlopsLaw
    dimensions: int

    @property
    def trained(self) -> bool:
        """Whether a backward does anything."""
        return self.backward != FlopsLaw()


@dataclass(frozen=True)
class FlopsForecast:
    """FLOPs of a step's parts: first forward, the loss with its backward, second forward (replay), backward."""

    first_forward: int
    loss: int
    second_forward: int
    backward: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.first_forward + self.loss + self.second_forward + self.backward


@dataclass(frozen=True)
class TokenCount:
    """Tokens, padding included: of the naive batch, of one forward of all chunks, and of the retained chunks."""

    padded: int
    encoded: int
    retained: int

    @property
    def rho(self) -> float:
        """encoded / padded."""
        return self.encoded / self.padded

    @property
    def retained_share(self) -> float:
        """r = retained / encoded: a share of tokens, not of rows or chunks."""
        return self.retained / self.encoded

    @property
    def time_ratio(self) -> float:
        """Time of the step over the naive step's, as `time_ratio` predicts it."""
        return time_ratio(self.rho, self.retained_share)


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of matrix products and attention in `call()`, as torch counts them.

    torch's counter does not know the CPU's own attention kernel (taken where no dropout falls on the weights): it is
    counted here as the other fused kernels are, 2 products forward and 5 backward, one of which is a recomputation.
    Raises ValueError where `call` cannot be called.
    """
    if not callable(call):
        raise refuse("call", "must be callable without arguments", type(call).__name__)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        call()
    return counter.get_total_flops()


class FlopsByPhase(UncompiledMode):
    """FLOPs of a step by (phase, tower, chunk), as `count_flops` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.totals: Counter[tuple] = Counter()
        self._place: tuple = ("start", None, None)
        kernels = {kernel: shape_wrapper(formula) for kernel, formula in CPU_ATTENTION.items()}
        self._formulas = {**flop_registry, **kernels}

    def step(self, step: Callable[..., Tensor], *arguments: Any, on_phase: Callable[..., None], **options: Any) -> Any:
        """The step, counted."""

        def noted(phase: str, **named: Any) -> None:
            self._place = (phase, named.get("tower"), named.get("chunk"))
            on_phase(phase, **named)

        with self:
            return step(*arguments, on_phase=noted, **options)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASKED_DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        formula = self._formulas.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.totals[self._place] += formula(*args, **(kwargs or {}), out_val=result)
        return result


def encoder_cost(encoder: nn.Module) -> EncoderCost:
    """The FLOPs laws of a module called as encoder(input_ids=..., attention_mask=...), in its present mode.

    A copy with fake tensors is run at four widths: no number is computed, no gradient or generator is touched.
    Raises ValueError where the module returns anything but (rows, D), or where its FLOPs are not linear in the rows and
    a parabola in the width.
    """
    if not isinstance(encoder, nn.Module):
        raise refuse("encoder", "must be a torch module", type(encoder).__name__)
    mode = FakeMode()
    copy = fake_copy(encoder, mode)
    trained = any(parameter.requires_grad for parameter in encoder.parameters())

    def counts(rows: int, width: int) -> tuple[int, int, int]:
        with mode:
            batch, outputs = padded_tokens(rows, width), []
            forward = count_flops(lambda: outputs.append(copy(**batch)))
            reps = _checked_reps(outputs.pop(), rows)
            return forward, count_flops(reps.sum().backward) if trained else 0, reps.shape[1]

    def deeper(few: tuple[int, ...], more: tuple[int, ...], times: int) -> tuple[int, ...]:
        return tuple(count + times * (other - count) for count, other in zip(few, more, strict=True))

    def fit(read: Callable[[int, int], tuple[int, ...]]) -> EncoderCost:
        by_width = {width: read(2, width) for width in WIDTHS}
        laws = [FlopsLaw.through({width: count[n] // 2 for width, count in by_width.items()}) for n in (0, 1)]
        for rows in (1, 3):
            if counts(rows, WIDTHS[-1])[:2] != tuple(law.at(rows, WIDTHS[-1]) for law in laws):
                raise refuse("encoder", "must cost FLOPs that are linear in the rows", f"others for {rows} of them")
        return EncoderCost(*laws, dimensions=by_width[WIDTHS[0]][2])

    with suppress(ValueError):
        return fit(lambda *shape: over_depth(copy, partial(counts, *shape), deeper))
    return fit(counts)


def forecast_flops(
    step: str,
    costs: Sequence[EncoderCost],
    lengths: Sequence[Sequence[int]],
    *,
    retain_chunks: int = 0,
    **cut: Any,
) -> FlopsForecast:
    """FLOPs of a "naive" or "grad_cache" step with two towers and the dense loss: what `count_flops` counts of it.

    costs: `encoder_cost` of each tower's encoder. lengths: each tower's rows in tokens; the batch is padded to its
    longest. retain_chunks: R. cut: the keywords of `plan_towers` (the naive step has no chunks). The loss: logits
    2 B N D, their gradients 2 B N D for each tower that asks for one. Raises ValueError for what does not fit.
    """
    one_of("step", step, ("naive", "grad_cache"))
    int_at_least("retain_chunks", retain_chunks, 0)
    if len(costs) != 2 or not all(isinstance(cost, EncoderCost) for cost in costs):
        raise refuse("costs", "must be two, as encoder_cost gives them (twice the same: tied)", costs)
    if step == "naive":
        for name, value in {**cut, "retain_chunks": retain_chunks or None}.items():
            if value is not None and name not in ("sort_by_length", "device"):
                raise refuse(name, "must not be given for the naive step, which has no chunks", "a value")
        retain_chunks = 2
        cut |= {"plan": [[Chunk(tuple(range(len(rows))), max(rows))] for rows in _checked(lengths)]}
    parts = dict.fromkeys(("first_forward", "second_forward", "backward"), 0)
    chunks = plan_towers(lengths, **cut)
    for tower, number, kept in schedule(chunks, retain_chunks):
        cost, chunk = costs[tower], chunks[tower][number]
        parts["first_forward"] += cost.forward.at(len(chunk), chunk.width)
        parts["backward"] += cost.backward.at(len(chunk), chunk.width)
        if not kept and cost.trained:
            parts["second_forward"] += cost.forward.at(len(chunk), chunk.width)
    product = 2 * len(lengths[0]) * len(lengths[1]) * costs[0].dimensions
    asked = sum(cost.trained for cost in costs) if step == "naive" else len(costs)
    return FlopsForecast(loss=(1 + asked) * product, **parts)


def count_tokens(
    lengths: Sequence[Sequence[int]],
    *,
    retain_chunks: int = 0,
    **cut: Any,
) -> TokenCount:
    """The tokens that a `grad_cache_step` encodes, and those of the padded naive batch. cut: as for `plan_towers`."""
    chunks = plan_towers(lengths, **cut)
    retained = schedule(chunks, int_at_least("retain_chunks", retain_chunks, 0))
    return TokenCount(
        padded=sum(len(rows) * max(rows) for rows in lengths),
        encoded=sum(chunk.tokens for tower in chunks for chunk in tower),
        retained=sum(chunks[tower][number].tokens for tower, number, kept in retained if kept),
    )


def time_ratio(rho: float, retained_share: float = 0.0) -> float:
    """Time over the naive step's, if time went with tokens: rho * (1 + (1 - r) / 3).

    A backward costs twice a forward, so the naive step costs 3 for each padded token. A cached step costs 3 for each
    token that it encodes, and 1 more where the chunk is encoded a second time: 4 / 3 for rho = 1, r = 0.
    retained_share: r, from 0 to 1, of the encoded tokens. Raises ValueError outside of that.
    """
    positive_number("rho", rho)
    if not 0 <= retained_share <= 1:
        raise refuse("retained_share", "must be from 0 to 1", retained_share)
    return rho * (1 + (1 - retained_share) / 3)


def plan_towers(
    lengths: Sequence[Sequence[int]],
    *,
    chunk_size: int | Sequence[int] | None = None,
    chunk_tokens: int | Sequence[int] | None = None,
    plan: Sequence[Sequence[Chunk]] | None = None,
    sort_by_length: bool = True,
    device: str = "cpu",
) -> list[list[Chunk]]:
    """The chunks of each tower, as `grad_cache_step` plans them for a device; without sorting every row counts as the
    longest. That of one process: among several the step cuts evenly (`plan_chunks` with call_tokens=None).
    """
    lengths = _checked(lengths)
    if plan is not None:
        if chunk_size is not None or chunk_tokens is not None or len(plan) != len(lengths):
            raise refuse("plan", f"must be {len(lengths)} lists of Chunk, and the only one given", f"{len(plan)} lists")
        return [check_plan(part, len(rows), max(rows)) for part, rows in zip(plan, lengths, strict=True)]
    sizes = as_tower_list("chunk_size", chunk_size, len(lengths))
    tokens = as_tower_list("chunk_tokens", chunk_tokens, len(lengths))
    return [
        plan_chunks(
            rows if sort_by_length else [max(rows)] * len(rows),
            chunk_size=size,
            chunk_tokens=budget,
            sort=sort_by_length,
            call_tokens=price_of_a_call(device),
        )
        for rows, size, budget in zip(lengths, sizes, tokens, strict=True)
    ]


def _checked(lengths: Sequence[Sequence[int]]) -> list[list[int]]:
    if isinstance(lengths, str) or not lengths or not all(isinstance(rows, Sequence) and rows for rows in lengths):
        raise refuse("lengths", "must hold a list of row lengths for each tower", lengths)
    return [[positive_int("lengths", length) for length in rows] for rows in lengths]


def _checked_reps(reps: Any, rows: int) -> Tensor:
    if not isinstance(reps, Tensor) or reps.ndim != 2 or reps.shape[0] != rows:
        got = f"shape {tuple(reps.shape)}" if isinstance(reps, Tensor) else type(reps).__name__
        raise refuse("encoder", f"must return representations (rows, D) for its {rows} rows", got)
    return reps
