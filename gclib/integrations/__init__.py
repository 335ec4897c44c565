"""The trainers that people already use, with the gradient cache as their loss (sentence_transformers).

In a `SentenceTransformerTrainer` the loss is exchanged, and nothing else:

    from gclib.integrations.sentence_transformers import GradCacheLoss

    loss = GradCacheLoss(model)  # in place of CachedMultipleNegativesRankingLoss(model); it chooses its own chunks

Elsewhere `gclib.grad_cache_loss` stands where the loss is taken, and backward() stays the trainer's own.

transformers' Trainer, for a model that takes a tokenizer's output as keywords and returns one vector a row, of unit
length for cosines (`ContrastiveLoss` takes dot products),
with batches of {"query": ..., "passage": ..., "return_loss": True} (evaluation needs the last):

    import torch
    from gclib import ContrastiveLoss, grad_cache_loss
    from transformers import Trainer

    class ContrastiveTrainer(Trainer):  # with remove_unused_columns=False in its arguments
        loss_fn = ContrastiveLoss(temperature=0.05)  # own rank's negatives; across="gather": all ranks'

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            towers = [inputs["query"], inputs["passage"]]
            with torch.enable_grad():  # so that an evaluation takes it in chunks too
                loss = grad_cache_loss([model, model], towers, self.loss_fn, chunk_size=32)
            return (loss, {}) if return_outputs else loss

accelerate, with micro-batches or without:

    from accelerate import Accelerator
    from gclib import ContrastiveLoss, grad_cache_loss

    accelerator, loss_fn = Accelerator(gradient_accumulation_steps=2), ContrastiveLoss(temperature=0.05)
    encoder, optimizer, loader = accelerator.prepare(encoder, optimizer, loader)
    for queries, passages in loader:
        with accelerator.accumulate(encoder):
            loss = grad_cache_loss([encoder, encoder], [queries, passages], loss_fn, chunk_size=32)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
"""
