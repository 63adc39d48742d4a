"""The linear probe: the frozen base with only a head on top, trained centrally to convergence.

The head sees all training rows at once and has the regularisation that validates best, so it is a stronger baseline
than any federated head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2)  # L2 on the weights of standardised features


def fit_probe(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor] | None, test: tuple[Tensor, Tensor], classes: int
) -> float:
    """Test accuracy (0 to 1) of multinomial logistic regression on features (rows, width) with labels (rows,).

    The penalty is the one with the best validation accuracy (the first of equals); without validation rows, the first.
    """
    mean, deviation = train[0].mean(0), train[0].std(0).clamp_min(1e-6)

    def scaled(split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return (split[0] - mean) / deviation, split[1]

    if validation is None:
        return _accuracy(_fit(scaled(train), classes, PENALTIES[0]), scaled(test))
    fits = [_fit(scaled(train), classes, penalty) for penalty in PENALTIES]
    best = max(fits, key=lambda fit: _accuracy(fit, scaled(validation)))
    return _accuracy(best, scaled(test))


def _fit(split: tuple[Tensor, Tensor], classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    x, y = split
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, y) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _accuracy(fit: tuple[Tensor, Tensor], split: tuple[Tensor, Tensor]) -> float:
    x, y = split
    return float((torch.argmax(x @ fit[0].T + fit[1], -1) == y).double().mean())
