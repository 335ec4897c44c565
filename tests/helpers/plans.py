"""Random jobs for `plan_step`, and what is asked of its plans: bytes by the ledger, time against a grid of all cuts."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertModel

from gclib import ContrastiveLoss, grad_cache_step, plan_step, record_memory
from gclib.memory import step_plan
from gclib.memory.batch_laws import batch_step
from tests.helpers.oracles import TinyEncoder, unique_parameters

SLACK = 1.03  # of the budget, up to which a point of the grid is run: the plan's bytes are an upper bound
MOST_RUNS = 5  # of points that would be quicker than the plan


class SmallBert(nn.Module):
    """A BERT of random size with mean pooling."""

    def __init__(self, dice: random.Random, hidden: int):
        super().__init__()
        config = BertConfig(
            hidden_size=hidden,
            num_hidden_layers=dice.choice([1, 2]),
            num_attention_heads=dice.choice([1, 2]),
            intermediate_size=dice.choice([16, 48, 96]),
            vocab_size=23,
            max_position_embeddings=64,
            hidden_dropout_prob=dice.choice([0.0, 0.1]),
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids, attention_mask):
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weights).sum(1) / weights.sum(1)


@dataclass
class Job:
    """Encoders, one batch, a loss and a budget."""

    encoders: list
    inputs: list
    loss: nn.Module
    budget: int

    def ledger_bytes(self, **options) -> int:
        """The peak of the real step, verification and all."""
        for parameter in unique_parameters(*self.encoders, self.loss):
            parameter.grad = None
        with record_memory(*{id(e): e for e in self.encoders}.values(), self.loss) as ledger:
            grad_cache_step(self.encoders, self.inputs, self.loss, on_phase=ledger.on_phase, **options)
        for parameter in unique_parameters(*self.encoders, self.loss):
            parameter.grad = None
        return ledger.peak_bytes

    def cost(self):
        """The plan's own reckoning of the batch: (cost, bytes of the loss)."""
        towers = step_plan.check_towers(self.encoders, self.inputs, self.loss, mask=None, on_phase=None, scaler=None)
        fake, start = batch_step(towers), step_plan.StartBytes.of(towers, self.loss, None)
        laws = [fake.chunk_laws(tower.number, tower.width or None) for tower in towers]
        cost = step_plan.BatchCost(laws, towers, start, states=fake.state_bytes())
        return cost, fake.loss_bytes(self.loss, towers, None)


def encoder_pool(seed: int, count: int = 8) -> list[list[nn.Module]]:
    """Pairs of encoders, tied and not."""
    dice, pairs = random.Random(seed), []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for number in range(count):
            hidden = dice.choice([16, 32, 48])
            if number % 4 == 0:
                made = [TinyEncoder(0.1, width=hidden) for _ in range(2)]
            else:
                made = [SmallBert(dice, hidden) for _ in range(1 + number % 2)]
            pairs.append([made[0], made[-1]])
    return pairs


def random_job(seed: int, pool: list[list[nn.Module]]) -> Job:
    """A batch of random size and lengths, and a budget from hardly possible to more than enough."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = dice.choice([3, 8, 16, 40])
    queries, passages = rows, rows * (1 + dice.choice([0, 0, 1, 3]))
    inputs = [_texts(n, dice.randint(3, 60), dice.choice([0.0, 1.0, 3.0]), generator) for n in (queries, passages)]
    job = Job(dice.choice(pool), inputs, ContrastiveLoss(0.1), 0)
    cost, loss = job.cost()
    least = cost.chunks(step_plan.Cut("chunk_size", (1, 1)), "own").peak(0, loss)
    most = cost.chunks(cost.as_one).peak(2, loss)
    job.budget = int(least + (1.2 * most - least) * dice.random() ** 2)
    return job


def _texts(rows: int, width: int, skew: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows of unlike length; skew 0: all full; the more, the fewer long ones."""
    lengths = (1 + (width - 1) * torch.rand((rows, 1), generator=generator) ** skew).round().long()
    lengths[0] = width
    mask = (torch.arange(width) < lengths).long()
    return {"input_ids": torch.randint(1, 23, (rows, width), generator=generator) * mask, "attention_mask": mask}


@dataclass(frozen=True)
class Judged:
    """What was seen of a plan: ledger over budget, plan's bytes over ledger; its cost (FLOPs and calls) over the least
    of the grid by the ledger, and its encoders' FLOPs alone over the fewest of the grid by the plan's reckoning.
    """

    of_budget: float
    of_ledger: float
    cost_ratio: float
    flops_ratio: float


def judge(job: Job) -> Judged:
    """Plan the job, run it under the ledger, and hold it against every cut with every number of retained chunks."""
    plan = plan_step(job.encoders, job.inputs, job.loss, budget_bytes=job.budget)
    seen = job.ledger_bytes(**plan.options(), verify="always")
    cost, loss = job.cost()
    value = plan.chunk_size or plan.chunk_tokens
    name = "chunk_size" if plan.chunk_size else "chunk_tokens"
    values = tuple(value) if isinstance(value, tuple) else (value, value)
    own = cost.chunks(cost.as_one if plan.step == "naive" else step_plan.Cut(name, values))
    mine = _times(own, plan.retain_chunks)
    points = list(_points(cost, loss, job.budget, mine))
    best = _best(job, [(_times(*point)[0], *point) for point in points], mine[0])
    fewest = min([mine[1], *(_times(*point)[1] for point in points if point[0].peak(point[1], loss) <= job.budget)])
    return Judged(seen / job.budget, plan.peak_bytes / seen, mine[0] / best, mine[1] / fewest)


def _points(cost, loss, budget: int, mine: tuple[float, float]):
    """(chunks, retained) of every cut of the grid that may fit and be better than the plan, in cost or in FLOPs: by the
    plan's reckoning, and a little above it.
    """
    for chunks in _grid(cost):
        if all(least >= own for least, own in zip(_times(chunks, chunks.count), mine, strict=True)):
            continue
        for retained in {chunks.most_retained(int(budget * slack), loss) for slack in (1, SLACK)} - {None}:
            yield chunks, retained


def _best(job: Job, points: list, mine: float) -> float:
    """The least value of those that fit by the ledger; that of the plan where none is less."""
    for value, chunks, retained in sorted(points, key=lambda point: point[0])[:MOST_RUNS]:
        if value >= mine:
            break
        cut = chunks.cut
        options = {cut.name: list(cut.values), "retain_chunks": retained, "sort_by_length": not cut.whole}
        if job.ledger_bytes(**options) <= job.budget:
            return value
    return mine


def _times(chunks, retained: int) -> tuple[float, float]:
    """FLOPs and calls, and FLOPs alone, of the encoders."""
    cost, calls = chunks.time(retained), np.array(chunks.cost.call)[chunks.tower]
    again = chunks.trained & ~chunks._kept(retained)
    return cost, cost - float((calls * (1 + 2 * chunks.trained + again)).sum())


def _grid(cost):
    yield cost.chunks(cost.as_one)
    most = max(len(each.widths) for each in cost.rows)
    for rows in sorted({min(most, round(1.1**n)) for n in range(60)}):
        yield cost.chunks(step_plan.Cut("chunk_size", (rows, rows)), "own")
    most = max(len(each.widths) * int(each.widths[0]) for each in cost.rows)
    for tokens in sorted({round(2 ** (n / 8)) for n in range(8 * most.bit_length())}):
        if tokens <= most:
            yield cost.chunks(step_plan.Cut("chunk_tokens", (tokens, tokens)), "own")
