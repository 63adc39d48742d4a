"""What the tests of methods share: a random local training, and matrices to compare with, in float64."""

from __future__ import annotations

import torch

from rayfed.lora.adapter import Adapter, LowRank

NON_SQUARE = {"tall": (7, 5), "wide": (4, 9)}


def training(seed, size=0.4):
    """Random changes of all entries, also of those that must not train; another draw for each client and round."""
    draw = torch.Generator().manual_seed(seed)

    def train(client, start, adapter):
        vector = adapter.flatten()
        return adapter.layout.unflatten(vector + size * torch.randn(vector.shape, generator=draw))

    return train


def begun(random_adapter, zero, shapes=NON_SQUARE, rank=4, scale=2.0):
    """Random factors to start from, with B = 0 where ``zero``."""
    adapter = random_adapter(shapes, rank, scale, seed=1)
    if not zero:
        return adapter
    layers = {name: LowRank(torch.zeros_like(p.B), p.A, p.scale) for name, p in adapter.layers.items()}
    return Adapter(layers, adapter.head)


def dense(change):
    """A pair or a matrix as a float64 matrix; a pair's product is taken in float64."""
    if isinstance(change, LowRank):
        return change.scale * change.B.double() @ change.A.double()
    return change.double()


def relative(ours, theirs):
    """The Frobenius distance as a share of theirs."""
    return float((dense(ours) - theirs).norm() / theirs.norm())


def close(ours, theirs, tolerance=1e-6):
    assert (dense(ours) - theirs).norm() <= tolerance * theirs.norm(), relative(ours, theirs)


def product(update, name, change):
    """A client's product: as sent, or with its change."""
    vector = update.start.double() + (update.change.double() if change else 0)
    return dense(update.layout.unflatten(vector).layers[name])


def mean_of_products(updates, layer):
    """``sum_k p_k s_k B_k A_k`` of what the clients trained."""
    total = sum(u.weight for u in updates)
    return sum(u.weight / total * dense(u.trained.layers[layer]) for u in updates)


def truncation(W, rank):
    """The best approximation of that rank."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]
