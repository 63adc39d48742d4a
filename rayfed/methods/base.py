"""The base class of methods. A federated LoRA method is a function from state to state.

A method decides what every client receives, which entries train, and how the uploads become the next global state. It
works on adapters and client profiles. It knows no Ray, no models and no files. In every round the server calls

1. `broadcast` for each client (for each tier, if the method is not `personal`): where the client starts. The wire then
   encodes the start: entries that the client knows do not travel; of the others the largest travel, or those of a mask.
2. `trainable` for each client: which entries train, and which of them stay with the client.
3. `select` at each client whose upload is sparse: which entries of its change go up.
4. `aggregate` once: the next state, from the decoded start and change of every client.
5. `base_update` once: what every client must merge into its base. The server counts it for each client that takes
   part, for all rounds that the client missed, or the whole change of the base where that is smaller.

The server optimizer, the aggregation weights, the densities and the number formats are settings of their own.
docs/write-a-method.md shows how to write a method; `rayfed/methods/flasc.py` is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from rayfed.config.options import check_options
from rayfed.lora.adapter import Adapter, Layout, LowRank
from rayfed.methods._means import Advance, fedavg, mean_change
from rayfed.methods._messages import BaseChange, PackSum, Sparse, Start, Trainable, Update, Updates
from rayfed.methods._state import State
from rayfed.profiles.profile import Profile
from rayfed.wire import top_k

Source = Literal["paper read", "authors' code read", "abstract only", "secondary", "ours"]

ANY_OPTIMIZER = ("fedavg", "sgd", "fedavgm", "fedadam", "adamw")


class Method:
    """One federated LoRA method. A subclass is a frozen dataclass of its options, or any class that pickles.

    Every option of a dataclass is a field of a type that YAML has (a number, a string, true or false, one of some
    words; null), with a default and a docstring. A type such as pydantic's NonNegativeFloat gives a number its range.
    The base class checks the options and raises UserError.
    """

    paper: ClassVar[str] = ""
    """Where the method was published, such as "arXiv 2406.05233"."""
    summary: ClassVar[str] = ""
    """What the method does, in one line of at most about 80 characters."""
    traffic_down: ClassVar[str] = "r (in + out)"
    """The entries that a client receives per layer and round. r, in, out: rank and layer sizes; d: densities."""
    traffic_up: ClassVar[str] = "r (in + out)"
    """The entries that a client sends per layer and round."""
    source: ClassVar[Source] = "ours"
    """What was read to write the method."""

    weights: ClassVar[str] = "examples"
    """The paper's aggregation weights: the name of a weighting."""
    averages: ClassVar[Literal["changes", "products"]] = "changes"
    """What the mean is taken of: the entries of the clients' changes, or the changes of the layers' products. The
    weighting `norm` measures clients there."""
    ignores_weights: str = ""
    """Why the weights of the server do not count in `aggregate`, in a few words. Empty: they do. Then a weighting that
    needs statistics of the clients is refused."""
    optimizer: ClassVar[str] = "fedavg"
    """The paper's server optimizer."""
    optimizers: ClassVar[tuple[str, ...]] = ("fedavg",)
    """The server optimizers that make sense with the method."""
    mixed_ranks: ClassVar[bool] = False
    """True if clients may have different ranks."""
    sparse_down: ClassVar[bool] = True
    """True if downloads may be sparse or rounded."""
    sparse_up: ClassVar[bool] = True
    """True if uploads may be sparse or rounded."""
    personal: bool = False
    """True if every client gets a payload of its own. False: clients of equal rank and density share one."""
    sum_in_worker: ClassVar[bool] = False
    """True if `aggregate` needs only the sum of the weighted changes. Then the server passes `PackSum`s, which are
    added up where the clients trained."""

    fixed_gauge: ClassVar[bool] = False
    """True if entry i of the adapter means the same for all clients of one rank and in all rounds: the same entries
    train in every round, no entry is a client's own, and with the plain server step the next start is the start plus
    the weighted mean of the changes. Then an objective may add up vectors of different rounds."""

    mixing: ClassVar[Literal["exact", "biased"] | None] = None
    """What clients get that average their entries with neighbours, on a graph without a server. `exact`: the mean of
    their models, because an entry means the same for all of them and the model is linear in what trains. `biased`: the
    mean of factors, which is not the mean of products. None: entries of two clients cannot be averaged."""

    secure_aggregation: bool = False
    """True if `aggregate` needs nothing of the uploads but one weighted sum of them, over entries and with weights that
    the server knows before it sees an upload. Then secure aggregation could hide each single upload from the server.
    This is said of dense uploads: which entries of a sparse one are the largest depends on the client's data. Ranks,
    scales and numbers of examples count as known."""

    summed: Literal["changes", "products"] | None = None
    """What `aggregate` takes the weighted mean of, where it needs nothing else of the uploads: the `changes` of the
    entries (n,), those of smaller ranks padded with zeros; or the changes of the layers' `products` and of the head,
    see `product_change`. User-level privacy adds noise to that sum and passes it on as one update, of client -1. A
    `personal` method gets before it an update of weight 0 and without a change for each client, to know who received
    what. None: `aggregate` needs more, or the weights depend on the cohort."""
    refuses_privacy: str = "it does not say that it needs one sum of the uploads alone (Method.summed)"
    """Why user-level privacy does not take a method whose `summed` is None, in a few words."""

    refuses_adapter: ClassVar[str] = ""
    """Why a run cannot start from a given adapter (`model.adapter`), in a few words. Empty: it can. Then what the
    clients do not have of that adapter travels: in the first downloads, or as the `base_update` of the first state."""

    state_class: ClassVar[type[State]] = State
    """The class of the method's state."""

    def __post_init__(self) -> None:
        """Checks the options. UserError for a value that an option does not allow."""
        check_options(type(self), vars(self), "method")

    def init(self, adapter: Adapter, seed: int) -> Any:
        """The state before the first round. Called once a run.

        ``adapter`` has the largest rank of all clients, B = 0, a random A, and the start values of the head; or it is
        the given one (`model.adapter`), and `delta` of the state is its change. It has no layers if only the head
        trains. ``seed`` is the run's seed, for what the method draws.
        """
        raise NotImplementedError

    def restore(
        self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], clients: Mapping[int, Mapping[str, Tensor]]
    ) -> Any:
        """The state that gave these `State.tensors`, `State.facts` and `State.clients`. Called when a run resumes."""
        return self.state_class.restore(tensors, facts, clients)

    def broadcast(self, state: Any, client: Profile) -> Start:
        """Where a client starts in the round that begins with ``state``. Must not change the state.

        Called once for each tier, or for each client of a `personal` method. `aggregate` may call it again.
        """
        raise NotImplementedError

    def trainable(self, state: Any, client: Profile) -> Trainable:
        """Which entries the client trains in the round that begins with ``state``. Called once for each client."""
        return Trainable()

    def select(self, start: Tensor, change: Tensor, layout: Layout, budget: int, density: float) -> Tensor:
        """Which entries a client uploads, as sorted int64 indices into (n,), at most ``budget`` of them.

        Called at the client, if its upload is sparse. ``start`` (n,) is the vector from which it trained. ``change``
        (n,) is zero where nothing trained and where nothing may be sent. ``density`` is the client's, in (0, 1].
        """
        return top_k(change, budget)

    def aggregate(self, state: Any, updates: Iterable[Any], advance: Advance = fedavg) -> Any:
        """The state after the round that began with ``state``. Called once a round; must not change ``state``.

        ``updates`` is a stream of one `Update` for each client that trained, in a fixed order; at least one. Clients
        that diverged and were dropped are not in it: the cohort can be smaller than `server.cohort`. It can be read
        once; to keep all of them takes memory for the whole cohort. A `sum_in_worker` method gets `PackSum`s instead.
        ``advance(name, value, mean_change)`` takes one step of the server optimizer. It stores its moments by name, so
        each name must stand for the same entries in every round. ValueError if no update has a positive weight.
        """
        raise NotImplementedError

    def base_update(self, state: Any) -> Tensor | None:
        """What every client must merge into its base after the last round, (m,); None: nothing. Called once a round.

        Of the first state it is what every client must merge before it trains for the first time.
        """
        return None

    def delta(self, state: Any, layer: str) -> LowRank | Tensor:
        """The global model's whole change of a layer, the change of the base included: a pair or a matrix (out, in).

        Called for evaluation and export.
        """
        raise NotImplementedError

    def head(self, state: Any) -> Mapping[str, Tensor]:
        """The global head by parameter name. Called for evaluation and export."""
        raise NotImplementedError

    def layers(self, state: Any) -> tuple[str, ...]:
        """The names of the adapted layers. Called for evaluation and export."""
        raise NotImplementedError


__all__ = [
    "ANY_OPTIMIZER", "Advance", "BaseChange", "Method", "PackSum", "Profile", "Source", "Sparse", "Start", "Trainable",
    "Update", "Updates", "fedavg", "mean_change",
]  # fmt: skip
