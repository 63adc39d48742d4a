"""A client counts as much as it moved: p_k ~ ||change_k||, of the decoded change.

The norm is taken where the method takes its mean: of the change of the product s B A and of the head, for methods that
average products; of the entries of factors and head, for all others. If nothing moved, clients count by their examples.

No client sends anything for this. HetLoRA's own weights (`method.name: hetlora`) are the norms of the products
themselves, not of their changes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rayfed.profiles.profile import Profile
from rayfed.weighting.base import Weighting, prior


class Norm(Weighting):
    """The weight is the L2 norm of what the client's upload changes."""

    needs = "change_norms"

    def weights(self, clients: Sequence[Profile], statistics: Tensor) -> Tensor:
        norms = statistics[:, 0]
        return norms if bool(norms.any()) else prior(clients)
