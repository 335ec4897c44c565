"""gclib: contrastive training with batches far bigger than memory allows.

Gradient caching (Gao et al. 2021) in `gclib.steps`, the losses in `gclib.losses`, and the bytes of both before and
while they run in `gclib.memory.forecast` and `gclib.memory.ledger`. The training core loads neither plots nor widgets.
"""

from gclib.chunks import Chunk, plan_chunks
from gclib.distance import distance_cache_step
from gclib.distributed import average_gradients, gather_with_grad, process_group
from gclib.losses.dense import contrastive_loss
from gclib.losses.module import ContrastiveLoss
from gclib.losses.ring import ring_contrastive_loss
from gclib.losses.tiled import tiled_contrastive_loss
from gclib.memory.devices import GPU_MEMORY_BYTES
from gclib.memory.forecast import MemoryForecast, forecast_step
from gclib.memory.ledger import MemoryLedger, record_memory
from gclib.memory.plan import StepPlan, best_plan, choose_retained, largest_batch, largest_chunk
from gclib.memory.step_plan import plan_step
from gclib.models.encoder import Encoder
from gclib.models.presets import PRESETS, config_of
from gclib.randomness import RandomState
from gclib.steps import accumulation_step, grad_cache_loss, grad_cache_step, naive_step

__all__ = [
    "GPU_MEMORY_BYTES",
    "PRESETS",
    "MemoryForecast",
    "MemoryLedger",
    "StepPlan",
    "best_plan",
    "choose_retained",
    "config_of",
    "forecast_step",
    "largest_batch",
    "largest_chunk",
    "record_memory",
    "tiled_contrastive_loss",
    "Chunk",
    "ContrastiveLoss",
    "Encoder",
    "RandomState",
    "accumulation_step",
    "average_gradients",
    "contrastive_loss",
    "distance_cache_step",
    "gather_with_grad",
    "grad_cache_loss",
    "grad_cache_step",
    "naive_step",
    "plan_chunks",
    "plan_step",
    "process_group",
    "ring_contrastive_loss",
]
