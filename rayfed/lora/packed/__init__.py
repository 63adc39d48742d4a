"""Packed training: the adapters of many clients over one frozen model, in one batch.

- `segments`: which rows of the batch belong to which client.
- `ragged`: padding and unpadding of sequences of different lengths.
- `dropout`: counter-based dropout.
- `kernel`: the LoRA term and its gradients.
- `layers`: the stacked layers.
- `stack`: replaces a model's layers by stacked layers and moves adapters in and out of their slots.
"""
