"""A federated problem with a known answer: linear regression whose optimum has a chosen rank (derived here).

The model is one layer without a bias. Its weights are frozen at 0, so the model equals its change W (out, in). Client k
has n rows (x, y) and the loss

    f_k(W) = 1/(2n) sum_rows ||y - W x||^2 = 1/2 tr((W - W_k) H_k (W - W_k)^T),   H_k = X_k^T X_k / n,   Y_k = X_k W_k^T

with its own curvature H_k and its own optimum W_k. The objective is the mean over clients, F = (1/K) sum_k f_k, and

    F(W) - F(W*) = 1/2 tr((W - W*) H (W - W*)^T),    H = (1/K) sum_k H_k

holds exactly, with W* of the chosen rank, because the shifts W_k - W* cancel in the gradient at W*:

    H_k  = Q_k diag(l) Q_k^T      Q_k a random orthogonal matrix; l log-spaced, l_max / l_min = condition, mean 1
    D_k  = Gaussian, of Frobenius norm shift ||W*||
    W_k  = W* + D_k - M           M = (sum_k D_k H_k) (sum_k H_k)^-1, so that sum_k (W_k - W*) H_k = 0

X_k is a matrix with orthonormal columns, scaled, times H_k^(1/2), so H_k is exact and not only an expectation. Two
settings make clients differ: ``condition`` (at 1 all clients have the same curvature) and ``shift`` (at 0 all clients
have the optimum W*, and a method without bias reaches it exactly).

The data are float32. H and W* are computed from the rounded data, in float64: W* solves the normal equations, and has
the chosen rank up to the rounding of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rayfed import seeding


@dataclass(frozen=True)
class Problem:
    """The rows of all clients, client after client, and the optimum. N = clients * rows."""

    features: np.ndarray  # (N, in) float32
    targets: np.ndarray  # (N, out) float32
    owner: np.ndarray  # (N,) int64: the client of each row, 0 to clients - 1, ascending
    rank: int  # of the optimum

    @cached_property
    def curvature(self) -> np.ndarray:
        """H (in, in), float64: the mean curvature of the clients."""
        X = self.features.astype(np.float64)
        return X.T @ X / len(X)

    @cached_property
    def optimum(self) -> np.ndarray:
        """W* (out, in), float64: the minimiser of F."""
        Y, X = self.targets.astype(np.float64), self.features.astype(np.float64)
        return np.linalg.solve(self.curvature, X.T @ Y / len(X)).T

    @cached_property
    def floor(self) -> float:
        """F(W*), float64: the smallest loss of any single model."""
        residual = self.targets - self.features.astype(np.float64) @ self.optimum.T
        return 0.5 * float(np.square(residual).sum()) / len(residual)

    @property
    def clients(self) -> int:
        """Number of clients."""
        return int(self.owner[-1]) + 1


def make_problem(
    *, out: int = 32, inner: int = 32, rank: int = 12, clients: int = 120, rows: int = 64, condition: float = 10.0,
    shift: float = 0.5, seed: int = 0,
) -> Problem:  # fmt: skip
    """Draws a problem, keyed by ``seed``.

    The layer has ``inner`` inputs and ``out`` outputs, and every client has ``rows`` rows. W* is a product of Gaussian
    matrices, (out, rank) and (rank, inner), scaled to the Frobenius norm sqrt(rank). ``rank`` is at most
    min(out, inner), ``rows`` at least ``inner`` (else H_k is singular), ``condition`` at least 1, ``shift`` at least 0.
    """
    rng = seeding.numpy_rng(seed, "lowrank.optimum")
    W = rng.normal(size=(out, rank)) @ rng.normal(size=(rank, inner))
    W *= np.sqrt(rank) / np.linalg.norm(W)
    eigenvalues = np.geomspace(1, condition, inner)
    eigenvalues /= eigenvalues.mean()
    X = np.empty((clients, rows, inner))
    D = np.empty((clients, out, inner))
    for k in range(clients):
        rng = seeding.numpy_rng(seed, "lowrank.client", k)
        Q, _ = np.linalg.qr(rng.normal(size=(inner, inner)))
        Z, _ = np.linalg.qr(rng.normal(size=(rows, inner)))
        X[k] = np.sqrt(rows) * (Z * np.sqrt(eigenvalues)) @ Q.T
        D[k] = rng.normal(size=(out, inner))
        D[k] *= shift * np.sqrt(rank) / np.linalg.norm(D[k])
    features = X.astype(np.float32)
    X = features.astype(np.float64)
    H = X.transpose(0, 2, 1) @ X / rows
    M = np.linalg.solve(H.sum(0), (D @ H).sum(0).T).T
    targets = (X @ (W + D - M).transpose(0, 2, 1)).astype(np.float32)
    owner = np.repeat(np.arange(clients), rows)
    return Problem(features.reshape(-1, inner), targets.reshape(-1, out), owner, rank)


def optimum_distances(problem: Problem) -> np.ndarray:
    """||W_k - W*|| / ||W*|| of each client (clients,), in float64: how far its own optimum is from the common one."""
    X = problem.features.reshape(problem.clients, -1, problem.features.shape[1]).astype(np.float64)
    Y = problem.targets.reshape(problem.clients, -1, problem.targets.shape[1])
    own = np.linalg.solve(X.transpose(0, 2, 1) @ X, X.transpose(0, 2, 1) @ Y)  # (clients, in, out)
    distances: np.ndarray = np.linalg.norm(own - problem.optimum.T, axis=(1, 2)) / np.linalg.norm(problem.optimum)
    return distances


def loss(problem: Problem, W: npt.ArrayLike) -> float:
    """F(W) of W (out, in), in float64."""
    return gap(problem, W) + problem.floor


def gap(problem: Problem, W: npt.ArrayLike) -> float:
    """F(W) - F(W*) of W (out, in), exact, in float64."""
    error = np.asarray(W, np.float64) - problem.optimum
    return 0.5 * float(((error @ problem.curvature) * error).sum())


def share(problem: Problem, W: npt.ArrayLike) -> float:
    """The gap of W (out, in) relative to the gap of W = 0: 1 at the start, 0 at the optimum."""
    return gap(problem, W) / gap(problem, np.zeros_like(problem.optimum))
