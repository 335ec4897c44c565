"""`plan_step` against the ledger of the real step, an exhaustive grid, and the naive step's gradient."""

import json
import random
from functools import partial

import pytest
import torch
from transformers import BertConfig

from gclib import ContrastiveLoss, Encoder, grad_cache_loss, grad_cache_step, naive_step, plan_chunks, plan_step
from gclib import record_memory
from gclib.chunks import price_of_a_call, schedule
from gclib.memory.flops import count_flops
from gclib.memory.step_plan import RowWidths
from gclib.support.validation import positive_int
from gclib.verify import check_towers
from tests.helpers.oracles import TinyEncoder, gradients, token_batch, unique_parameters, worst_error
