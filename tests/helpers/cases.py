"""Random batches, towers and options for every step that caches, and the oracle of one backward pass over all rows."""

import torch
from helpers.oracles import InfoNCE, TinyEncoder, token_batch
from hypothesis import strategies as st

from gclib.chunks import CALL_TOKENS


@st.composite
def cases(draw, dropout=False):
    """A random batch, towers and options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, negatives = draw(st.integers(1, 9)), draw(st.integers(0, 2))
    rate = 0.4 if dropout else 0.0
    torch.manual_seed(draw(st.integers(0, 2**31)))
    first = TinyEncoder(rate).double()
    second = first if draw(st.booleans()) else TinyEncoder(rate).double()
    loss = InfoNCE(draw(st.booleans()), draw(st.booleans())).double()
    total = batch * (1 + negatives)
    inputs = [token_batch(rows, draw(st.integers(1, 7)), generator) for rows in (batch, total)]
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, total, generator=generator) < 0.3
        mask[torch.arange(batch), torch.arange(batch) * (1 + negatives)] = False
    sizes = draw(st.one_of(st.integers(1, 11), st.tuples(st.integers(1, 11), st.integers(1, 11))))
    cut = {"chunk_size": sizes} if draw(st.booleans()) else {"chunk_tokens": draw(st.integers(1, 40))}
    options = {"retain_chunks": draw(st.integers(0, 8)), "sort_by_length": draw(st.booleans()), **cut}
    options["price"] = draw(st.sampled_from([0, 2, 6, CALL_TOKENS["cpu"]]))
    return [first, second], inputs, loss, mask, options


def whole_batch(encoders, inputs, loss, mask):
    """The oracle: encode everything, one backward."""
    value = loss(*(encoder(**given) for encoder, given in zip(encoders, inputs, strict=True)), mask)
    value.backward()
    return value
