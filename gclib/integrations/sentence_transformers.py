"""`GradCacheLoss`: the gradient cache as a loss of sentence-transformers, for its `SentenceTransformerTrainer`.

Its own name of a column's role: anchor, positive and negatives are here the query, its passage and K hard negatives.
Letters: B queries, K hard negatives a query, N = B * (1 + K) passages, D dimensions.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.losses.masks import HARDNESS, HardnessWeight
from gclib.losses.module import ContrastiveLoss
from gclib.memory.step_plan import plan_step
from gclib.steps import grad_cache_loss
from gclib.support.validation import int_at_least, one_of, positive_int, positive_number, refuse
from gclib.verify import WHEN

TEMPERATURE = 0.05
DIRECTIONS = {  # sentence-transformers' names, and ours
    "query_to_doc": "query_to_passage",
    "doc_to_query": "passage_to_query",
    "query_to_query": "query_to_query",
    "doc_to_doc": "passage_to_passage",
}
OTHER_NAMES = {  # sentence-transformers' settings, and what they are here
    "mini_batch_size": 'is chunk_size here; or leave it out, and "auto" chooses',
    "mini_batch_num_tokens": "is chunk_tokens here",
    "show_progress_bar": "must be left out: the Trainer shows its own",
}
# What only stands in batches whose rows lie end to end, without an axis of texts that could be cut into chunks.
WITHOUT_ROWS = ("offsets", "cu_seq_lens_q")


class GradCacheLoss(nn.Module):
    """Takes the place of `CachedMultipleNegativesRankingLoss`: the same loss and gradient, encoded by length.

        loss = GradCacheLoss(model)
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss)

    Columns as there: anchor, positive, then any number of negatives. Each is a tower of its own, so that it keeps its
    width, its prompt and whatever stands beside its tokens; its rows are sorted by length within it. The loss is
    `ContrastiveLoss`: query i against all N passages, with its positive at i * (1 + K).

    temperature, or scale = 1 / temperature. similarity_fct: `cos_sim` or `dot_score` of sentence_transformers.util.
    directions, partition_mode, hardness_mode, hardness_strength: as there (a warning where one of the two is missing).
    gather_across_devices: against the texts of all ranks, which may have unlike numbers of rows.

    chunk_size "auto" plans each batch (`gclib.plan_step`): the chunks, and how many of them keep their graph, that take
    the least time within budget_bytes (None: what is free on a card, half of it on a processor). Or chunk_size,
    chunk_tokens, retain_chunks as in `gclib.grad_cache_step`. verify: as there. tile_size: as in `ContrastiveLoss`.
    What has another name there, and is left in a call by habit, is refused with ours.

    `MatryoshkaLoss` goes around it as around any cached loss. Raises ValueError for settings that can't be, columns
    that do not fit, inputs without an axis of texts, and under AdaptiveLayerLoss.
    """

    uses_gradient_cache = True  # so MatryoshkaLoss puts its own calculate_loss before ours

    def __init__(
        self,
        model: nn.Module,
        *unnamed: Any,
        temperature: float = TEMPERATURE,
        scale: float | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        chunk_size: int | str | None = "auto",
        chunk_tokens: int | None = None,
        retain_chunks: int = 0,
        budget_bytes: int | None = None,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        gather_across_devices: bool = False,
        tile_size: int | str | None = None,
        verify: str = "first",
        **theirs: Any,
    ):
        super().__init__()
        for name, value in theirs.items():
            raise refuse(name, OTHER_NAMES.get(name, "is no setting of this loss"), value)
        if unnamed:
            raise refuse("what follows the model", "must be given by name (scale=20.0)", unnamed[0])
        if not isinstance(model, nn.Module) or "losses" in type(model).__module__.split("."):
            raise refuse("model", "must be the SentenceTransformer that is trained, and no loss", type(model).__name__)
        if similarity_fct not in (cos_sim, dot_score):
            raise refuse("similarity_fct", "must be cos_sim or dot_score of sentence_transformers.util", similarity_fct)
        if unknown := [name for name in directions if name not in DIRECTIONS]:
            raise refuse("directions", f"must be of {', '.join(map(repr, DIRECTIONS))}", unknown[0])
        self.model = model
        self._tower = (Embedder(model),)  # in a tuple, so that no parameter is listed twice
        self.similarity_fct = similarity_fct
        self.cut = _checked_cut(chunk_size, chunk_tokens, retain_chunks, budget_bytes)
        self.verify = one_of("verify", verify, WHEN)
        self.directions, self.partition_mode = tuple(directions), partition_mode
        self.hardness_mode, self.hardness_strength = hardness_mode, hardness_strength
        self.contrastive = ContrastiveLoss(
            _temperature_of(temperature, scale),
            directions=[DIRECTIONS[name] for name in directions],
            partition=partition_mode,
            tile_size=tile_size,
            across="gather" if gather_across_devices else "none",
        )
        self.rule = _hardness(hardness_mode, hardness_strength)

    @property
    def encoder(self) -> "Embedder":
        """The model as a tower takes it; the Trainer exchanges `model` for one that is wrapped."""
        if self._tower[0].model is not self.model:
            self._tower = (Embedder(self.model),)
        return self._tower[0]

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
        step = [self.encoder] * len(columns), columns, self._loss_of
        with torch.enable_grad():
            cut = self.cut
            if "budget_bytes" in cut:
                cut = plan_step(*step, **cut).options()
            loss = grad_cache_loss(*step, **cut if trains else cut | {"retain_chunks": 0}, verify=self.verify)
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
        loss = self.contrastive(queries, torch.stack(passages, dim=1).flatten(0, 1), mask=self.rule)
        if with_backward:
            loss.backward()
            return loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card."""
        return {
            "temperature": self.temperature,
            "similarity_fct": self.similarity_fct.__name__,
            **({"chunk_size": "auto"} | self.cut),
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
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

    def _loss_of(self, *reps: Tensor) -> Tensor:
        """The loss with its graph. A wrapper's calculate_loss leaves gradients instead: they are put into a graph,
        r . u - (r . u)' with u held fixed, whose value is 0 and whose gradient is u.
        """
        if "calculate_loss" not in vars(self):
            return self.calculate_loss([[rep] for rep in reps])
        leaves = [rep.detach().requires_grad_() for rep in reps]
        value = self.calculate_loss([[leaf] for leaf in leaves], with_backward=True).detach()
        return value + sum(((r - r.detach()) * leaf.grad).sum() for r, leaf in zip(reps, leaves, strict=True))


class Embedder(nn.Module):
    """A SentenceTransformer as an encoder: from a column's features, by name, to representations (rows, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **features: Any) -> Tensor:
        """What stands beside tensors (a modality, a task) is handed on as it is."""
        return self.model(features)["sentence_embedding"]


def _temperature_of(temperature: float, scale: float | None) -> float:
    if scale is None:
        return positive_number("temperature", temperature)
    if temperature != TEMPERATURE:
        raise refuse("scale", "must not be given beside a temperature: it is 1 / temperature", (temperature, scale))
    return 1 / positive_number("scale", scale)


def _hardness(mode: str | None, strength: float) -> HardnessWeight | None:
    """The rule; None, and a warning, where a mode or a strength alone weighs nothing."""
    one_of("hardness_mode", mode, (None, *HARDNESS))
    if strength != 0:
        positive_number("hardness_strength", strength)
    if mode is not None and strength != 0:
        return HardnessWeight(strength, mode)
    if mode is not None or strength != 0:
        warnings.warn(f"hardness_mode={mode!r} with hardness_strength={strength} weighs nothing", stacklevel=3)
    return None


def _checked_cut(chunk_size: Any, chunk_tokens: Any, retain_chunks: int, budget_bytes: Any) -> dict[str, Any]:
    """How a batch is cut, as keywords: `grad_cache_loss`'s, or `plan_step`'s where chunks are to be planned."""
    int_at_least("retain_chunks", retain_chunks, 0)
    if chunk_size == "auto" and chunk_tokens is None:
        if retain_chunks:
            raise refuse("retain_chunks", 'must be 0 with chunk_size="auto", which chooses them', retain_chunks)
        return {"budget_bytes": None if budget_bytes is None else positive_int("budget_bytes", budget_bytes)}
    if budget_bytes is not None:
        raise refuse("budget_bytes", 'must be None without chunk_size="auto"', budget_bytes)
    if chunk_tokens is None:
        return {"chunk_size": positive_int("chunk_size", chunk_size), "retain_chunks": retain_chunks}
    if chunk_size not in ("auto", None):
        raise refuse("chunk_size", "and chunk_tokens: one of them must be given", (chunk_size, chunk_tokens))
    return {"chunk_tokens": positive_int("chunk_tokens", chunk_tokens), "retain_chunks": retain_chunks}


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
