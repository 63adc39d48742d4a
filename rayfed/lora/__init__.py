"""LoRA as tensors: no Ray, no models, no settings.

- `adapter`: the adapter (pairs, scales, head) and its flat vector.
- `algebra`: exact sums, decompositions and norms of low-rank changes.
- `peft`: PEFT: config, target modules, files.
- `packed/`: layers that train the adapters of many clients in one batch.
"""
