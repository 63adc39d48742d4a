"""The schema: every setting has a description and limits that hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from changed_settings import FIELDS, FULL
from pydantic import BaseModel, ValidationError

from rayfed.config import Experiment, validate
from rayfed.config.describe import allowed_values, format_value, iter_fields, section_of
from rayfed.config.marks import settings_digest
from rayfed.config.types import Section
from rayfed.errors import UserError


def sections(model: type[BaseModel] = Experiment) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if inner := section_of(field):
            yield from sections(inner)


def leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def refusal(**settings: Any) -> str:
    with pytest.raises(UserError) as error:
        validate(settings)
    return str(error.value)


def test_iter_fields_finds_every_setting() -> None:
    assert list(FIELDS) == list(leaves(FULL.model_dump(mode="json")))


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_sections_and_fields_are_described(section: type[BaseModel]) -> None:
    assert section.__doc__ != Section.__doc__
    assert (section.__doc__ or "").strip()
    assert [name for name, field in section.model_fields.items() if not (field.description or "").strip()] == []


def test_the_digest_is_the_settings_and_not_how_they_were_written() -> None:
    assert len(FULL.digest()) == 16
    int(FULL.digest(), 16)
    a = validate({"lora": {"rank": 4, "alpha": 8}, "method": {"name": "flasc", "mask": "fixed", "train": "masked"}})
    b = validate({"method": {"train": "masked", "mask": "fixed", "name": "flasc"}, "lora": {"alpha": 8.0, "rank": 4}})
    assert a.digest() == b.digest() != FULL.digest()


def test_defaults_are_valid_and_frozen() -> None:
    for section in sections():
        if section.__name__ not in ("EarlyStop", "ClassSequence"):  # patience and experiences have no default
            section.model_validate(section().model_dump())
    with pytest.raises(ValidationError):
        FULL.client.lr = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("seed", "an integer in [0, 9223372036854775807]"),
        ("lora.rank", "an integer in [1, 100000]"),
        ("engine.pack", "an integer in [1, 10000] or auto"),
        ("lora.target_modules", "a string (up to 1000 bytes), a list of up to 200 strings (up to 120 bytes) or null"),
        ("lora.layers_to_transform", "a list of up to 1000 integers in [0, 10000] or null"),
        ("wire.up.density", "a number in (0, 1]"),
        ("wire.up.values", "fp32, bf16, fp16, int8, qsgd2, qsgd3, qsgd4, qsgd5, qsgd6, qsgd7 or qsgd8"),
        ("client.betas", "a list of 2 numbers in [0, 1)"),
        ("client.clip_norm", "a number in [1e-30, 1e+30] or null"),
        ("model.normalize", "true or false"),
        ("tracking.tags", "a list of up to 100 strings (up to 64 bytes)"),
        ("profiles.ranks", "a list of up to 10000 integers in [1, 100000] or null"),
        ("profiles.densities_up", "a list of up to 10000 numbers in (0, 1] or null"),
        ("profiles.weights", "a list of up to 10000 numbers in [1e-30, 1e+30] or null"),
        ("profiles.exponent", "a number in [-10, 10]"),
    ],
)
def test_what_a_field_allows_in_words(name: str, says: str) -> None:
    assert allowed_values(FIELDS[name]) == says


def test_every_field_can_say_what_it_allows() -> None:
    assert all(allowed_values(field) for _, field in iter_fields(Experiment))
    assert allowed_values(Experiment.model_fields["checkpoint"]) == "a section with the keys every, keep"


@pytest.mark.parametrize("name", ["client", "server"])
@pytest.mark.parametrize("betas", [[0.9, 1.0], [-0.1, 0.9], [1.5, 0.9], [0.9], [0.9, 0.9, 0.9], 0.9, ["0.9", 0.9]])
def test_betas_are_two_numbers_below_one(name: str, betas: Any) -> None:
    assert refusal(**{name: {"betas": betas}}).startswith(f"{name}.betas: got {betas!r}, but it should be a list of 2 ")


def test_betas_may_be_zero() -> None:
    assert validate({"client": {"betas": [0, 0.0]}}).client.betas == (0.0, 0.0)


@pytest.mark.parametrize(
    ("amount", "fine"), [(0, True), (0.25, True), (1, True), (1.5, False), (2.0, False), (1e-5, False)]
)
def test_a_worker_holds_a_share_of_one_gpu(amount: float, fine: bool) -> None:
    settings = {"engine": {"gpus_per_worker": amount}}
    if fine:
        assert validate(settings).engine.gpus_per_worker == amount
    else:
        assert refusal(**settings).startswith(f"engine.gpus_per_worker: got {amount}, but")


def test_a_worker_may_hold_one_and_a_half_cpus() -> None:
    assert validate({"engine": {"cpus_per_worker": 1.5}}).engine.cpus_per_worker == 1.5
    assert (
        refusal(engine={"cpus_per_worker": 1e-5})
        == "engine.cpus_per_worker: got 1e-05, but Ray takes 0 or at least 0.0001"
    )


@pytest.mark.parametrize("target", ["all-linear", "query"])
def test_layers_to_transform_needs_a_list_of_modules(target: str) -> None:
    line = refusal(lora={"target_modules": target, "layers_to_transform": [0]})
    assert line.startswith("lora.layers_to_transform: got [0], but PEFT takes it only with target_modules as a list")
    for names in ([target], None):
        validate({"lora": {"target_modules": names, "layers_to_transform": [0]}})


def test_dora_is_refused_by_name() -> None:
    assert refusal(lora={"use_dora": True}).startswith("lora.use_dora: got true, but DoRA's magnitudes are no low-rank")
    validate({"lora": {"rslora": True}})


def test_layer_indices_count_from_zero() -> None:
    assert refusal(lora={"layers_to_transform": [-1]}).startswith("lora.layers_to_transform: got [-1], but")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"source": "files"}, "data.path: got null, but data.source=files needs a folder or a file"),
        ({"source": "hub"}, "data.name: got null, but data.source=hub needs the name of a data set"),
        ({"path": "x"}, "data.path: got 'x', but that belongs to data.source=files, and the source is stdlib"),
        ({"name": "x"}, "data.name: got 'x', but that belongs to data.source=hub, and the source is stdlib"),
        (
            {"source": "files", "path": "p", "subset": "x"},
            "data.subset: got 'x', but that belongs to data.source=hub, and the source is files",
        ),
        (
            {"source": "hub", "name": "n", "path": "x"},
            "data.path: got 'x', but that belongs to data.source=files, and the source is hub",
        ),
    ],
)
def test_a_source_has_its_own_settings_and_no_others(data: dict[str, Any], line: str) -> None:
    assert refusal(data=data) == line


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"engine": {"device": "cuda", "gpus_per_worker": 0}},
            "engine.gpus_per_worker: got 0, but engine.device=cuda needs more than 0",
        ),
        (
            {"lora": {"train": "head"}, "model": {"head": "frozen"}},
            "lora.train: got 'head', but model.head=frozen leaves nothing to train; all is allowed",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], line: str) -> None:
    assert refusal(**settings) == line


def taken(settings: dict[str, Any]) -> bool:
    """Whether they are accepted, and are what the experiment then has."""
    has = validate(settings).model_dump(mode="json")
    return all(has[section][field] == value for section, given in settings.items() for field, value in given.items())


def test_what_looks_odd_but_is_fine() -> None:
    assert taken(
        {"partition": {"kind": "natural", "clients": 3}, "data": {"client": "owner"}, "server": {"cohort": 50}}
    )
    assert taken({"eval": {"every": 1000}, "server": {"rounds": 2}})
    assert taken({"partition": {"kind": "iid", "alpha": 3.0, "classes": 7}})
    assert taken({"engine": {"kind": "local", "device": "cuda"}})


def test_density_decays_in_steps() -> None:
    up = validate({"wire": {"up": {"density": 0.5, "decay": 0.5, "every": 2}}}).wire.up
    assert [up.density_at(t) for t in range(5)] == [0.5, 0.5, 0.25, 0.25, 0.125]
    assert [up.density_at(t, 1.0) for t in range(5)] == [1, 1, 0.5, 0.5, 0.25]  # a client's own, with the same decay


@pytest.mark.parametrize("decay", [0.01, 1e-200])
def test_a_density_never_decays_to_zero(decay: float) -> None:
    up = validate({"wire": {"up": {"density": 0.5, "decay": decay}}}).wire.up
    assert up.density_at(1999) == up.density_at(1999, 1.0) == 2**-31
    assert up.density_at(1999, 1e-12) == 1e-12  # a density that a client has by itself


def test_a_change_cannot_be_clipped_to_no_limit() -> None:
    with pytest.raises(UserError, match=r"^client\.on_divergence: got 'clip', but client\.max_change=null "):
        validate({"client": {"on_divergence": "clip", "max_change": None}})


LIST = {"kind": "list", "ranks": [2, 4]}
TIERS = {"kind": "tiers", "ranks": [2, 4]}


@pytest.mark.parametrize(
    ("profiles", "line"),
    [
        ({"ranks": [2]}, "ranks: got [2], but that belongs to profiles.kind=list or tiers or heavy_tailed, and the "
                         "kind is same"),
        ({"kind": "uniform", "densities_up": [0.5]}, "densities_up: got [0.5], but that belongs to profiles.kind=list "
                                                     "or tiers or heavy_tailed, and the kind is uniform"),
        (LIST | {"weights": [1, 1]}, "weights: got [1.0, 1.0], but that belongs to profiles.kind=tiers, and the kind "
                                     "is list"),
        (TIERS | {"exponent": 2}, "exponent: got 2.0, but that belongs to profiles.kind=heavy_tailed, and the kind is "
                                  "tiers"),
        (TIERS | {"low": 2}, "low: got 2, but that belongs to profiles.kind=uniform or normal, and the kind is tiers"),
        ({"high": 2}, "high: got 2, but that belongs to profiles.kind=uniform or normal, and the kind is same"),
        ({"kind": "uniform", "std": 2}, "std: got 2.0, but that belongs to profiles.kind=normal, and the kind is "
                                        "uniform"),
        ({"function": "a:b"}, "function: got 'a:b', but that belongs to profiles.kind=function, and the kind is same"),
        ({"kind": "list"}, "ranks: got null, but profiles.kind=list needs ranks or densities"),
        ({"kind": "tiers", "weights": [1]}, "ranks: got null, but profiles.kind=tiers needs ranks or densities"),
        ({"kind": "heavy_tailed", "densities_up": [1]}, "ranks: got null, but profiles.kind=heavy_tailed needs ranks"),
        ({"kind": "tiers", "ranks": []}, "ranks: got [], but it needs at least one value"),
        ({"kind": "tiers", "densities_up": []}, "densities_up: got [], but it needs at least one value"),
        (TIERS | {"weights": [1, 1, 2]}, "weights: got 3 values, but profiles.ranks has 2, and the lists must be of "
                                         "one length"),
        (
            {"kind": "tiers", "densities_down": [0.5, 1], "densities_up": [1]},
            "densities_up: got 1 values, but profiles.densities_down has 2, and the lists must be of one length",
        ),
        (LIST, "ranks: got 2 values, but the population has 100 clients (partition.clients)"),
        ({"kind": "list", "densities_up": [1]}, "densities_up: got 1 values, but the population has 100 clients "
                                                "(partition.clients)"),
        ({"kind": "tiers", "ranks": [2, 17, 99]}, "ranks: got 17, but no rank may exceed lora.rank=16, the server's"),
        ({"kind": "uniform", "low": 17}, "low: got 17, but no rank may exceed lora.rank=16, the server's"),
        ({"kind": "normal", "high": 17}, "high: got 17, but no rank may exceed lora.rank=16, the server's"),
        ({"kind": "normal", "low": 9, "high": 8}, "low: got 9, but it may not exceed profiles.high=8"),
        ({"kind": "normal", "low": 2, "mean": 1.5}, "mean: got 1.5, but it should be from low=2 to high=16"),
        ({"kind": "normal", "high": 8, "mean": 9}, "mean: got 9.0, but it should be from low=1 to high=8"),
        ({"kind": "function"}, "function: got null, but it is written package.module:function"),
        *(
            ({"kind": "function", "function": path}, f"function: got {path!r}, but it is written "
                                                     "package.module:function")
            for path in ("", "mine", "mine:", ":f", "a b:f", "a..b:f", "a:f:g", "a:f()", "a:b.c", "../a:f")
        ),
    ],
)  # fmt: skip
def test_profiles_that_are_refused(profiles: dict[str, Any], line: str) -> None:
    assert refusal(profiles=profiles) == f"profiles.{line}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "nothing"),
        ("ranks", [0]),
        ("ranks", [2.0]),
        ("ranks", [True]),
        ("ranks", 4),
        ("densities_down", [0]),
        ("densities_up", [1.5]),
        ("weights", [0, 1]),
        ("weights", [-1]),
        ("exponent", 11),
        ("low", 0),
        ("high", 0),
        ("std", 0),
    ],
)
def test_values_of_profiles_that_are_refused(name: str, value: Any) -> None:
    line = f"profiles.{name}: got {format_value(value)}, but it should be {allowed_values(FIELDS['profiles.' + name])}"
    assert refusal(profiles={name: value}) == line


def test_a_long_list_makes_no_long_refusal() -> None:
    for kind in ("same", "list"):
        assert len(refusal(profiles={"kind": kind, "ranks": [2] * 100_000})) < 150


def test_profiles_that_are_fine() -> None:
    for profiles in (
        {"kind": "list", "ranks": [16] * 100, "densities_up": [0.5] * 100},
        {"kind": "list", "densities_down": [1.0] * 100},
        {"kind": "tiers", "densities_up": [0.25, 1], "weights": [3, 1]},
        {"kind": "heavy_tailed", "ranks": [4, 4, 16], "exponent": -2},
        {"kind": "uniform", "low": 16},
        {"kind": "normal", "low": 3, "high": 3, "mean": 3},
        {"kind": "function", "function": "some.where:ranks"},
    ):
        assert taken({"profiles": profiles})
    natural = {"partition": {"kind": "natural"}, "data": {"client": "owner"}}
    validate({"profiles": LIST, **natural})  # how many clients there are, only the data say


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("client.lr", True, "true"),
        ("client.lr", "0.1", "'0.1'"),
        ("client.lr", math.nan, "nan"),
        ("client.lr", math.inf, "inf"),
        ("client.lr", None, "null"),
        ("client.lr", 0, "0"),
        ("server.lr", math.nan, "nan"),
        ("server.rounds", 2.0, "2.0"),
        ("server.rounds", "2", "'2'"),
        ("server.rounds", True, "true"),
        ("server.rounds", 0, "0"),
        ("seed", -1, "-1"),
        ("model.normalize", 1, "1"),
        ("model.normalize", "true", "'true'"),
        ("model.name", 7, "7"),
        ("data.validation", 1, "1"),
        ("wire.down.density", 0, "0"),
        ("wire.down.density", 1.5, "1.5"),
        ("wire.down.values", "double", "'double'"),
        ("wire.down.values", False, "false"),
        ("lora.target_modules", 3, "3"),
        ("lora.target_modules", ["query", 3], "['query', 3]"),
        ("lora.target_modules", {"query": 1}, "{'query': 1}"),
        ("lora.layers_to_transform", [True], "[true]"),
        ("lora.layers_to_transform", [1.0], "[1.0]"),
        ("tracking.tags", "one", "'one'"),
        ("tracking.tags", [1, 2], "[1, 2]"),
    ],
)
def test_nothing_is_converted_and_one_mistake_is_one_line(name: str, value: Any, shown: str) -> None:
    settings: dict[str, Any] = {}
    *parents, last = name.split(".")
    inner = settings
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    assert refusal(**settings) == f"{name}: got {shown}, but it should be {allowed_values(FIELDS[name])}"


def test_integers_stand_for_numbers() -> None:
    assert validate({"client": {"lr": 1}}).client.lr == 1.0


@pytest.mark.parametrize(("device", "able", "chosen"), [
    ("cpu", True, "bfloat16"), ("cpu", False, "float32"), ("cuda", True, "bfloat16"), ("cuda", False, "float32"),
])  # fmt: skip
def test_the_dtype_auto_is_a_choice_by_the_device(monkeypatch, device, able, chosen) -> None:
    """Made where the settings are read: their dump, and so config.yaml and the digest, name the choice."""
    asked: list[str] = []
    monkeypatch.setattr("rayfed.device.multiplies_bfloat16", lambda name: asked.append(name) or able)
    engine = {"engine": {"device": device}}
    found = validate({"model": {"dtype": "auto"}, **engine})
    assert asked == [device]
    assert found.model_dump()["model"]["dtype"] == chosen
    assert found.digest() == validate({"model": {"dtype": chosen}, **engine}).digest()
    assert found.with_("lora.rank=2").model.dtype == chosen
    assert Experiment(model={"dtype": "auto"}, **engine).model.dtype == chosen


def test_the_dtype_auto_is_float32_where_nothing_else_is_allowed(monkeypatch) -> None:
    monkeypatch.setattr("rayfed.device.multiplies_bfloat16", lambda _: True)
    assert validate({"data": {"source": "lowrank"}, "model": {"dtype": "auto"}}).model.dtype == "float32"


def test_adapters_compute_in_bfloat16_on_a_base_in_bfloat16_alone() -> None:
    assert refusal(lora={"compute": "bfloat16"}) == (
        "lora.compute: got 'bfloat16', but that needs model.dtype=bfloat16, and the dtype is float32; "
        "auto and float32 are allowed"
    )
    assert validate({"lora": {"compute": "float32"}, "model": {"dtype": "bfloat16"}}).lora.compute == "float32"


def test_the_digest_does_not_depend_on_adapters_in_the_bases_format() -> None:
    """Runs from before the setting was there keep their digests."""
    before = validate({}).model_dump(mode="json")
    del before["lora"]["compute"]
    assert settings_digest(before) == validate({}).digest() != validate({"lora": {"compute": "float32"}}).digest()


def test_a_section_says_all_of_its_mistakes() -> None:
    with pytest.raises(UserError) as error:
        validate({"channel": {"snr": 10.0, "power": 2.0}, "data": {"source": "files", "packing": True}})
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == [
        "data.packing",
        "data.path",
        "channel.power",
        "channel.snr",
    ]
    engine = {"kind": "ray", "device": "cuda", "gpus_per_worker": 0}
    said = refusal(lora={"train": "head"}, model={"head": "frozen"}, engine=engine).splitlines()
    assert [line.partition(":")[0] for line in said] == ["lora.train", "engine.gpus_per_worker"]
