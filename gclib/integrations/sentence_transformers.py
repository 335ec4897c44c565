"""`GradCacheLoss`: the gradient cache as a loss of sentence-transformers, for its `SentenceTransformerTrainer`.

Its own name of a column's role: anchor, positive and negatives are here the query, its passage and K hard negatives.
Letters: B queries, K hard negatives a query, N = B * (1 + K) passages, D dimensions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.losses.module import ContrastiveLoss
from gclib.steps import grad_cache_loss
from gclib.support.validation import one_of, positive_int, positive_number, refuse

TEMPERATURE = 0.05
PARTITIONS = ("joint", "per_direction")
BOTH_WAYS = {"query_to_doc", "doc_to_query"}
# What only stands in batches whose rows lie end to end, without an axis of texts that could be cut into chunks.
WITHOUT_ROWS = ("offsets", "cu_seq_lens_q")


class GradCacheLoss(nn.Module):
    """Takes the place of `CachedMultipleNegativesRankingLoss`: the same loss and gradient, encoded by length.

        loss = GradCacheLoss(model, chunk_size=32)
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss)

    Columns as there: anchor, positive, then any number of negatives. Each is a tower of its own, so that it keeps its
    width, its prompt and whatever stands beside its tokens; its rows are sorted by length within it. The loss is
    `ContrastiveLoss`: query i against all N passages, with its positive at i * (1 + K).

    temperature, or scale = 1 / temperature. similarity_fct: `cos_sim` or `dot_score` of sentence_transformers.util.
    directions, partition_mode: ("query_to_doc",), or with "doc_to_query", each with a softmax of its own
    ("per_direction"); others are refused. gather_across_devices: against the passages of all ranks, which may have
    unlike numbers of rows. chunk_size, chunk_tokens, retain_chunks, verify: as in `gclib.grad_cache_step`. tile_size:
    as in `ContrastiveLoss`. `MatryoshkaLoss` goes around it as around any cached loss.

    Raises ValueError for settings that can't be, columns that do not fit, and inputs without an axis of texts.
    """

    uses_gradient_cache = True  # so MatryoshkaLoss puts its own calculate_loss before ours

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = TEMPERATURE,
        scale: float | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        chunk_size: int | None = None,
        chunk_tokens: int | None = None,
        retain_chunks: int = 0,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        gather_across_devices: bool = False,
        tile_size: int | str | None = None,
        verify: str = "first",
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise refuse("model", "must be the SentenceTransformer that is trained", type(model).__name__)
        if similarity_fct not in (cos_sim, dot_score):
            raise refuse("similarity_fct", "must be cos_sim or dot_score of sentence_transformers.util", similarity_fct)
        if (chunk_size is None) == (chunk_tokens is None):
            raise refuse("chunk_size", "or chunk_tokens: exactly one must be given", (chunk_size, chunk_tokens))
        for name, value in (("chunk_size", chunk_size), ("chunk_tokens", chunk_tokens)):
            if value is not None:
                positive_int(name, value)
        self.model = model
        self.similarity_fct = similarity_fct
        self.directions, self.partition_mode = _checked_directions(directions, partition_mode)
        self.options = {"chunk_size": chunk_size, "chunk_tokens": chunk_tokens, "verify": verify}
        self.retain_chunks = retain_chunks
        self.contrastive = ContrastiveLoss(
            _temperature_of(temperature, scale),
            symmetric=len(self.directions) == 2,
            tile_size=tile_size,
            across="gather" if gather_across_devices else "none",
        )

    @property
    def temperature(self) -> float:
        """What similarities are divided by."""
        return self.contrastive.temperature

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch, one mapping a column. Labels are not used: the positive of a query is its own row's.

        Without gradients (an evaluation) it is encoded in chunks too, and has no graph.
        """
        columns = [_as_inputs(features, number) for number, features in enumerate(sentence_features)]
        if len(columns) < 2:
            raise refuse("sentence_features", "must have two columns or more: anchor and positive", len(columns))
        _refuse_exchanged(self.model)
        trains = torch.is_grad_enabled()
        with torch.enable_grad():
            retained = self.retain_chunks if trains else 0
            towers = [self._embed] * len(columns)
            loss = grad_cache_loss(towers, columns, self._loss_of, retain_chunks=retained, **self.options)
        return loss if trains else loss.detach()

    def calculate_loss(
        self, reps: Sequence[Sequence[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of ready representations: for each column its pieces (rows, D), as cached losses have it there.

        with_backward: backpropagated as well, and detached.
        """
        columns = [torch.cat(tuple(pieces)) for pieces in reps]
        if len({len(column) for column in columns}) > 1:
            got = [len(column) for column in columns]
            raise refuse("sentence_features", "must have as many rows in every column", got)
        if self.similarity_fct is cos_sim:
            columns = [F.normalize(column, dim=1) for column in columns]
        queries, *passages = columns
        loss = self.contrastive(queries, torch.stack(passages, dim=1).flatten(0, 1))
        if with_backward:
            loss.backward()
            return loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card."""
        return {
            "temperature": self.temperature,
            "similarity_fct": self.similarity_fct.__name__,
            **{name: value for name, value in self.options.items() if value is not None},
            "retain_chunks": self.retain_chunks,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "gather_across_devices": self.contrastive.needs_whole_batch,
        }

    @property
    def citation(self) -> str:
        """The paper of the method, for the model card."""
        return (
            "@inproceedings{gao2021scaling,\n"
            "    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},\n"
            "    author={Gao, Luyu and Zhang, Yunyi and Han, Jiawei and Callan, Jamie},\n"
            "    booktitle={Proceedings of the 6th Workshop on Representation Learning for NLP (RepL4NLP)},\n"
            "    year={2021},\n"
            "    url={https://arxiv.org/abs/2101.06983}\n"
            "}"
        )

    def _embed(self, **features: Any) -> Tensor:
        return self.model(features)["sentence_embedding"]

    def _loss_of(self, *reps: Tensor) -> Tensor:
        """The loss with its graph. A wrapper's calculate_loss leaves gradients instead: they are put into a graph,
        r . u - (r . u)' with u held fixed, whose value is 0 and whose gradient is u.
        """
        if "calculate_loss" not in vars(self):
            return self.calculate_loss([[rep] for rep in reps])
        leaves = [rep.detach().requires_grad_() for rep in reps]
        value = self.calculate_loss([[leaf] for leaf in leaves], with_backward=True).detach()
        return value + sum(((r - r.detach()) * leaf.grad).sum() for r, leaf in zip(reps, leaves, strict=True))


def _temperature_of(temperature: float, scale: float | None) -> float:
    if scale is None:
        return positive_number("temperature", temperature)
    if temperature != TEMPERATURE:
        raise refuse("scale", "must not be given beside a temperature: it is 1 / temperature", (temperature, scale))
    return 1 / positive_number("scale", scale)


def _checked_directions(directions: Sequence[str], partition_mode: str) -> tuple[tuple[str, ...], str]:
    """Both, if there is a loss for them; ValueError else."""
    one_of("partition_mode", partition_mode, PARTITIONS)
    chosen = set(directions)
    if chosen == {"query_to_doc"} or (chosen == BOTH_WAYS and partition_mode == "per_direction"):
        return tuple(dict.fromkeys(directions)), partition_mode
    rule = 'must be ("query_to_doc",), or with "doc_to_query" and partition_mode="per_direction"; others are not there'
    raise refuse("directions", rule, f"{tuple(directions)}, {partition_mode!r}")


def _refuse_exchanged(model: nn.Module) -> None:
    """ValueError where another loss has put a forward of its own before a module's, and will take it off again."""
    for part in model.modules():
        own = type(vars(part).get("forward"))
        if own.__module__.startswith("sentence_transformers."):
            rule = (
                "must not be wrapped while its loss is taken, as AdaptiveLayerLoss and Matryoshka2dLoss do: backward() "
                "would encode without the wrapper, and train something else (MatryoshkaLoss may go around)"
            )
            raise refuse("model", rule, own.__name__)


def _as_inputs(features: Mapping[str, Any], column: int) -> dict[str, Any]:
    """A column's features as a tower's inputs. A prompt's length is one for all rows, in whatever form it comes."""
    if there := [name for name in WITHOUT_ROWS if name in features]:
        rule = "must have an axis of texts: static embeddings and flattened (unpadded) batches can't be cut into chunks"
        raise refuse(f"sentence_features[{column}]", rule, there[0])
    inputs = dict(features)
    if isinstance(length := inputs.get("prompt_length"), Tensor):
        inputs["prompt_length"] = int(length.flatten()[0])
    return inputs
