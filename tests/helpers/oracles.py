"""Oracles that share no code with gclib's steps and losses: plain autograd on whole batches, float64."""

import torch
from torch import Tensor, nn


class TinyEncoder(nn.Module):
    """An embedding, dropout, a sum over unmasked tokens, a linear layer: every parameter gets a gradient."""

    def __init__(self, dropout: float = 0.0, width: int = 5, vocabulary: int = 23):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(width, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = torch.tanh(self.drop(self.table(input_ids))) * attention_mask.unsqueeze(-1).to(self.out.weight.dtype)
        return self.drop(self.out(tokens.sum(dim=1)))


class InfoNCE(nn.Module):
    """The loss of equation (1), from logsumexp alone."""

    def __init__(self, symmetric: bool = False, learnable: bool = True):
        super().__init__()
        start = torch.tensor(0.4)
        self.temperature = nn.Parameter(start) if learnable else start
        self.symmetric = symmetric

    def forward(self, queries: Tensor, passages: Tensor, mask: Tensor | None = None) -> Tensor:
        logits = queries @ passages.T / self.temperature
        if mask is not None:
            logits = torch.where(mask, -torch.inf, logits)
        positives = torch.arange(len(queries)) * (len(passages) // len(queries))
        right = logits[torch.arange(len(queries)), positives]
        loss = (logits.logsumexp(dim=1) - right).mean()
        if self.symmetric:
            loss = (loss + (logits[:, positives].logsumexp(dim=0) - right).mean()) / 2
        return loss


def token_batch(rows: int, width: int, generator: torch.Generator, vocabulary: int = 23) -> dict[str, Tensor]:
    """Random tokens, rows of unlike length, padded on the right; the longest may be shorter than the batch is wide."""
    ids = torch.randint(1, vocabulary, (rows, width), generator=generator)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    mask = (torch.arange(width) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def unique_parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """Each parameter once."""
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def gradients(modules: list[nn.Module], step) -> tuple[Tensor, list[Tensor]]:
    """The loss that `step()` returns, and the parameters' change in one SGD step with lr=1."""
    parameters = unique_parameters(*modules)
    for parameter in parameters:
        parameter.grad = None
    before = [parameter.detach().clone() for parameter in parameters]
    loss = step()
    torch.optim.SGD(parameters, lr=1.0).step()
    changes = [old - parameter.detach() for old, parameter in zip(before, parameters, strict=True)]
    with torch.no_grad():
        for old, parameter in zip(before, parameters, strict=True):
            parameter.copy_(old)
    return loss.detach(), changes


def worst_error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error of a parameter on the whole gradient's scale (design: ||d|| / max(||g||, 1e-3 ||all||)).

    A gradient that is zero but for rounding (below 1e-13 of the whole) is measured by the whole: it is what is left of
    terms of that size. Where the whole is zero but for rounding (one pair alone: nothing to learn), the error is
    absolute.
    """
    whole = sum(gradient.norm() ** 2 for gradient in truth) ** 0.5
    if whole <= 1e-13:
        return float(max(gradient.norm() for gradient in found))
    sizes = [gradient.norm() for gradient in truth]
    scales = [max(size, 1e-3 * whole) if size > 1e-13 * whole else whole for size in sizes]
    errors = [(a - b).norm() / scale for a, b, scale in zip(found, truth, scales, strict=True)]
    return float(max(errors))
