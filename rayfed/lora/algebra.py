"""Exact algebra on low-rank changes: sums, singular value decompositions, truncation and norms.

A change is a `LowRank`, which stands for the matrix ``scale * B @ A``, or a matrix (out, in). Ranks and scales may
differ. A `LowRank` is multiplied out only where that costs no more (`stays_factored`). Results are a function of the
inputs' bits (on one machine with one thread count), carry no gradient and may share storage with the inputs. Their
dtype is ``dtype`` if given, else the inputs' (float32 or float64).

    sum_k w_k s_k B_k A_k = B A        with  B = [B_1 | ... | B_K],  A = [w_1 s_1 A_1; ...; w_K s_K A_K]
    s B A = (Q_B u) S (v Q_A^T)        with  B = Q_B R_B,  A^T = Q_A R_A,  s R_B R_A^T = u S v    (the core, R x R)
    ||s B A||^2 = s^2 tr((B^T B)(A A^T))

Rounding in a factored product is relative to ``|scale| ||B|| ||A||``, as in the product itself. Where large factors
cancel, float32 results lose digits; ``dtype=torch.float64`` avoids that.

Shapes: B (out, r), A (r, in), U (out, k), S (k,), Vh (k, in); R is a sum of ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rayfed.errors import RunError
from rayfed.lora.adapter import LowRank
from rayfed.seeding import torch_rng

Split = Literal["b", "sqrt"]
OVERSAMPLE = 16  # directions of a randomised SVD beyond the rank
DEAD = 1e-4  # a rank whose factors are smaller than this, relative to fresh ones, is dead


@dataclass(frozen=True)
class Spectrum:
    """The leading singular triples of a matrix, ``U @ diag(S) @ Vh``: U (out, k), S (k,) descending, Vh (k, in).

    In each column of U the (first) entry of the largest magnitude is positive.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def rank(self) -> int:
        return self.S.numel()


def stays_factored(out: int, in_: int, rank: int) -> bool:
    """The cost rule: a change of this rank is computed with as factors if ``rank < min(out, in_)``, else as a matrix.

    For sides m >= n, an SVD takes about ``6(m+n)R^2 + 24R^3`` operations by factors and ``6mn^2 + 20n^3 + 2mnR`` as a
    matrix: equal at R near 0.9 n (m = n) to 1.2 n (m >> n). Gram products take ``2R^2(m+n)`` against ``4mnR``.
    """
    return rank < min(out, in_)


def stack(pairs: Sequence[LowRank], weights: Sequence[float], *, dtype: torch.dtype | None = None) -> LowRank:
    """The exact weighted sum ``sum_k w_k s_k B_k A_k`` as one pair of scale 1. Its rank is the sum of the ranks.

    ``weights`` has one number of any sign for each of the one or more pairs.
    """
    tensors = _cast(dtype, *(tensor for pair in pairs for tensor in (pair.B, pair.A)))
    A = [weight * pair.scale * A_k for weight, pair, A_k in zip(weights, pairs, tensors[1::2], strict=True)]
    return LowRank(torch.cat(tensors[::2], dim=1), torch.cat(A, dim=0), 1.0)


def svd(change: LowRank | Tensor, rank: int | None = None, *, dtype: torch.dtype | None = None) -> Spectrum:
    """The exact thin SVD, its first ``rank`` triples (all: min(out, in, R) of them).

    For a pair: QR of both factors and the SVD of their R x R core, in float64, O((out + in) R^2 + R^3). For a matrix,
    and for ranks that `stays_factored` excludes: a dense SVD. Singular values past the true rank are rounding noise, at
    most about 1e-7 of the first (float64: 1e-15); their vectors are arbitrary but orthonormal. RunError for NaN and
    infinities.
    """
    if isinstance(change, LowRank):
        B, A = _cast(dtype, change.B, change.A)
        if stays_factored(*_shape(change), change.rank):
            (X_B, M_B, R_B), (X_A, M_A, R_A) = _qr(B), _qr(A.T)
            u, S, vh = torch.linalg.svd(_finite(change.scale * (R_B @ R_A.T)))
            U, Vh = X_B @ (M_B @ u[:, :rank]), (vh[:rank] @ M_A.T) @ X_A.T
            return _signed(U.to(B), S[:rank].to(B), Vh.to(B))
        W = change.scale * (B @ A)
    else:
        (W,) = _cast(dtype, change)
    U, S, Vh = torch.linalg.svd(_finite(W), full_matrices=False)
    return _signed(U[:, :rank], S[:rank], Vh[:rank])


def top_svd(W: Tensor, rank: int, *, iterations: int = 4, dtype: torch.dtype | None = None) -> Spectrum:
    """The top min(rank, out, in) singular triples of a matrix (out, in): exact where that is cheap, else randomised.

    Exact, by `svd`, if the smaller side is at most 256 or under 6 (rank + 16). Else by subspace iteration (Halko,
    Martinsson and Tropp 2011, algorithm 4.4) from a fixed random start, with 16 (``OVERSAMPLE``) further directions and
    ``iterations`` products with W W^T. In both cases U S Vh is a projection of W, so the error is known exactly:
    ``||W - U S Vh||_F^2 = ||W||_F^2 - sum S^2`` (see `tail_energy`).

    Measured at 768 x 768 and rank 48, float32, on two cores: 13 to 18 ms (2 iterations: 8 to 12 ms, exact: 130 to
    190 ms). Relative excess of ``||W - U S Vh||_F`` over the best possible, and largest error of a singular value in
    units of the first one, for singular values f(j), j = 0, 1, ..., and for a Gaussian matrix:

        f(j)                    exp(-j / 30)   1 / (j + 1)   1 / sqrt(j + 1)   Gaussian   constant
        excess                  1e-6           2e-4          6e-4              5e-3       0
        excess, 2 iterations    3e-4           3e-3          5e-3              1e-2       0
        singular values         8e-7           4e-5          2e-3              3e-2       1e-6

    The result is exact to rounding if the true rank of W is at most rank + 16. RunError as `svd`.
    """
    small, width = min(W.shape), rank + OVERSAMPLE
    if small <= 256 or small < 6 * width:
        return svd(W, rank, dtype=dtype)
    (W,) = _cast(dtype, W)
    Q = torch.linalg.qr(W @ _random_start(W.shape[1], width).to(W)).Q
    for _ in range(iterations):
        # One QR per iteration. A second one between the two products takes 25 % more time and changes no digit above.
        Q = torch.linalg.qr(W @ (W.T @ Q)).Q
    P, R = torch.linalg.qr(W.T @ Q)  # so that Q Q^T W = Q R^T P^T
    u, S, vh = torch.linalg.svd(_finite(R.T))
    return _signed(Q @ u[:, :rank], S[:rank], vh[:rank] @ P.T)


@functools.lru_cache(maxsize=8)
def _random_start(inner: int, width: int) -> Tensor:
    """Drawn on the CPU in float64 (inner, width): every device and dtype starts from the same subspace."""
    return torch.randn(inner, width, generator=torch_rng(0, "lora.top_svd"), dtype=torch.float64)


def factors(spectrum: Spectrum, rank: int, scale: float, split: Split = "b") -> LowRank:
    """The first min(rank, k) triples as a pair of the given scale: ``scale * B @ A = U S Vh``.

    ``split`` "b": ``B = U S / scale``, ``A = Vh``. "sqrt": ``B = U sqrt(S / scale)``, ``A = sqrt(S / scale) Vh``.
    """
    U, S, Vh = spectrum.U[:, :rank], spectrum.S[:rank] / scale, spectrum.Vh[:rank]
    if split == "b":
        return LowRank(U * S, Vh, scale)
    return LowRank(U * S.sqrt(), S.sqrt()[:, None] * Vh, scale)


def truncate(
    change: LowRank | Tensor, rank: int, scale: float, split: Split = "b", *, dtype: torch.dtype | None = None
) -> LowRank:
    """The best approximation of rank min(rank, out, in, R) in the Frobenius norm: exact `svd`, then `factors`."""
    return factors(svd(change, rank, dtype=dtype), rank, scale, split)


def tail_energy(S: Tensor, total_energy: float, rank: int) -> float:
    """``||W - W^r||_F^2``: the sum of the squared singular values past ``rank``.

    ``S`` (k,) are the leading singular values, from `svd` or `top_svd`; ``total_energy`` is ``||W||_F^2``, from `norm`.
    The values past S contribute ``total_energy - sum S^2``, or 0 where that is at most 32 roundings of the total
    (float32: 4e-6 of it). A rank over k counts as k.
    """
    squares = S.detach().to(torch.float64).square()
    unseen = total_energy - float(squares.sum())
    noise = 32 * torch.finfo(S.dtype).eps * total_energy
    return float(squares[rank:].sum()) + (unseen if unseen > noise else 0.0)


def pad(pair: LowRank, rank: int, A_fresh: Tensor) -> LowRank:
    """The same change at a larger rank: new columns of B are 0, new rows of A are rows r to ``rank`` of ``A_fresh``.

    If the new rows of A were 0 too, the new ranks would never get a gradient. ``A_fresh`` is (rank or more, in).
    ValueError for a rank under the pair's.
    """
    if rank < pair.rank:
        raise ValueError(f"rank: got {rank}, but the pair has rank {pair.rank} already")
    B, A = pair.B.detach(), pair.A.detach()
    zeros, fresh = B.new_zeros(B.shape[0], rank - pair.rank), A_fresh[pair.rank : rank].detach().to(A)
    return LowRank(torch.cat([B, zeros], dim=1), torch.cat([A, fresh], dim=0), pair.scale)


def revive(pair: LowRank, A_fresh: Tensor) -> LowRank:
    """Nearly the same change, in which every rank can train: a dead rank j gets ``A_fresh[j]`` in A and 0 in B.

    Rank j is dead if ``||B[:, j]||`` and ``||A[j]||`` are both at most ``1e-4 ||A_fresh[j]||``. Each moves the change
    by at most ``|scale| 1e-8 ||A_fresh[j]||^2``. ``A_fresh`` is (r or more, in).
    """
    B, A = pair.B.detach(), pair.A.detach()
    fresh = A_fresh[: pair.rank].detach().to(A)
    limit = DEAD * fresh.norm(dim=1)
    dead = (B.norm(dim=0) <= limit) & (A.norm(dim=1) <= limit)
    return LowRank(torch.where(dead, 0, B), torch.where(dead[:, None], fresh, A), pair.scale)


def rescale(pair: LowRank, scale: float) -> LowRank:
    """The same change with another scale: B is multiplied by the ratio."""
    return LowRank(pair.B.detach() * (pair.scale / scale), pair.A.detach(), scale)


def norm(x: LowRank | Tensor) -> float:
    """The Frobenius norm, computed in float64. For a pair the error is at most 1e-8 of ``|scale| ||B|| ||A||``."""
    if isinstance(x, Tensor):
        return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64))
    B, A = _cast(torch.float64, x.B, x.A)
    if stays_factored(*_shape(x), x.rank):
        square = x.scale * x.scale * float(((B.T @ B) * (A @ A.T)).sum())
    else:
        square = x.scale * float(((B.T @ (x.scale * (B @ A))) * A).sum())
    return math.sqrt(max(square, 0.0))


def inner_products(changes: Sequence[LowRank | Tensor]) -> Tensor:
    """(n, n): the Frobenius inner products of changes of one layer, in float64.

    ``<s B A, t C D> = s t tr((B^T C)(D A^T))``: pairs are multiplied out only where `stays_factored` says so. A norm of
    a difference that follows from these has an error of about 1e-8 of the norms of its terms.
    """
    products = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    pairs, matrices = {}, {}
    for i, change in enumerate(changes):
        if isinstance(change, LowRank) and stays_factored(*_shape(change), change.folded().rank):
            pairs[i] = change.folded()
        else:
            matrices[i] = (change.dense() if isinstance(change, LowRank) else change).detach().double()
    if pairs:
        B = torch.cat([pair.scale * pair.B.detach().double() for pair in pairs.values()], dim=1)
        A = torch.cat([pair.A.detach().double() for pair in pairs.values()])
        ranks = torch.tensor([pair.rank for pair in pairs.values()])
        owners = torch.eye(len(pairs), dtype=torch.float64).repeat_interleave(ranks, dim=0)  # (R, pairs)
        places = torch.tensor([*pairs])
        products[places[:, None], places] = owners.T @ ((B.T @ B) * (A @ A.T)) @ owners
        for i, matrix in matrices.items():
            products[i, places] = products[places, i] = ((matrix @ A.T) * B).sum(0) @ owners
    for i, matrix in matrices.items():
        for j, other in matrices.items():
            products[i, j] = (matrix * other).sum()
    return products


def add(dense: Tensor, pair: LowRank, weight: float = 1.0) -> Tensor:
    """``dense + weight * scale * B @ A`` as a new matrix (out, in), in the dtype of ``dense``."""
    B, A = pair.B.detach().to(dense), pair.A.detach().to(dense)
    return torch.addmm(dense.detach(), B, A, alpha=weight * pair.scale)


def _signed(U: Tensor, S: Tensor, Vh: Tensor) -> Spectrum:
    # LAPACK's signs depend on the machine. argmax returns the first of equal magnitudes.
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U)
    return Spectrum(U * sign, S, sign.T * Vh)


def _qr(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin QR of X (m, r) in float64, as Y (m, r), M (r, r), R (r, r): ``X = Y M R``, with ``Y M`` orthonormal."""
    X64, one = X.double(), torch.eye(X.shape[1], dtype=torch.float64, device=X.device)
    if X.dtype == torch.float32:
        # A third of the time of a QR. Its error is cond(X)^2 roundings of float64, so cond(X) is limited to about 1e4.
        R, failed = torch.linalg.cholesky_ex(X64.T @ X64, upper=True)
        M = torch.linalg.solve_triangular(R, one, upper=True)
        if not failed and R.norm() * M.norm() < 1e4:
            return X64, M, R
    Q, R = torch.linalg.qr(X64)
    return Q, one, R


def _cast(dtype: torch.dtype | None, *tensors: Tensor) -> list[Tensor]:
    """The tensors without gradient, in ``dtype`` or, if that is None, in their widest dtype."""
    dtype = dtype or functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.detach().to(dtype) for tensor in tensors]


def _finite(x: Tensor) -> Tensor:
    if not torch.isfinite(x).all():
        raise RunError("a layer's change has values that are not finite; lower client.lr or server.lr")
    return x


def _shape(pair: LowRank) -> tuple[int, int]:
    return pair.B.shape[0], pair.A.shape[1]
