"""Settings as people write them: YAML and overrides in, an Experiment or lines that help out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from rayfed.config import Experiment, dump_config, load_config
from rayfed.config.describe import iter_fields
from rayfed.errors import UserError

ROOT = Path(__file__).parents[2]
Write = Callable[[str], Path]
LEAVES = [name for name, _ in iter_fields(Experiment) if name != "eval.early_stop"]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "config.yaml"

    return write


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "empty.yaml"
    path.touch()
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    return str(error.value)


# Reading


def test_an_empty_file_is_all_defaults(empty: Path) -> None:
    assert load_config(empty) == Experiment()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configs_that_come_with_rayfed_load_and_are_what_they_resolve_to(path: Path, tmp_path: Path) -> None:
    import rayfed

    experiment = rayfed.load_config(path)  # method and axes included
    (tmp_path / "config.yaml").write_text(dump_config(experiment), encoding="utf-8")
    assert rayfed.load_config(tmp_path / "config.yaml") == experiment


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E3", 1000.0), ("1.5e2", 150.0), (".5", 0.5), ("2", 2.0), ("1_000.5", 1000.5), ("+1e+0", 1.0)],
)
def test_numbers_as_people_write_them(write: Write, text: str, value: float) -> None:
    assert load_config(write(f"client: {{lr: {text}}}")).client.lr == value


@pytest.mark.parametrize(
    "word", ["off", "on", "yes", "no", "n", "010", "1:30", "2024-01-02", "0x1f", "=", "1.2.3", "e5"]
)
def test_words_stay_words(write: Write, word: str) -> None:
    assert load_config(write(f"name: {word}")).name == word
    assert load_config(write(""), [f"name={word}"]).name == word


def test_off_is_a_word_and_true_is_true(write: Write) -> None:
    experiment = load_config(write("tracking: {console: off, wandb: off}\nlora: {rslora: True}"))
    assert (experiment.tracking.console, experiment.tracking.wandb, experiment.lora.rslora) == ("off", "off", True)


def test_a_number_with_a_leading_zero_is_not_read_as_octal(write: Write) -> None:
    assert refusal(write("seed: 010")) == "seed: got '010', but it should be an integer in [0, 9223372036854775807]"


def test_anchors_and_merges(write: Write) -> None:
    text = "client: {schedule: &slow {kind: cosine, warmup: 2}}\nserver: {schedule: {<<: *slow, warmup: 5}}"
    schedule = load_config(write(text)).server.schedule
    assert (schedule.kind, schedule.warmup) == ("cosine", 5)


def test_sections_with_nothing_under_them_are_defaults(write: Write) -> None:
    assert load_config(write("client:\nwire:\n  up:\nmethod:\n")) == Experiment()
    assert load_config(write("wire:\n  up:\n"), ["wire.up.density=0.5", "client="]).wire.up.density == 0.5


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("seed: 1\nseed: 2", "key 'seed' is given twice, in lines 1 and 2"),
        ("client: {lr: 1, lr: 2}", "key 'lr' is given twice, in line 1"),
        ("client: [", "expected the node content"),
        ("a: b: c", "mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("name: !!int one", "does not match its tag"),
        ("name: !!bool maybe", "does not match its tag"),
        ("seed: " + "9" * 5000, "does not match its tag or its type"),
        ("name: &a [*a]", "an alias stands within what it repeats"),
        ("? [a]\n: 1", "a key is a word, not a list or a mapping"),
        ("name: !!set {a, b}", "could not determine a constructor for the tag"),
        ("name: !!binary aGk=", "could not determine a constructor for the tag"),
        ("name: !mine x", "could not determine a constructor for the tag '!mine'"),
        ("[" * 600, "nested more than 32 levels deep"),
        ("\x07", "special characters are not allowed"),
    ],
)
def test_yaml_that_is_refused(write: Write, text: str, what: str) -> None:
    path = write(text)
    line = refusal(path)
    assert line.startswith(f"{path}: not valid YAML: ")
    assert what in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system [touch {0}]", "object/new:os.system [touch {0}]", "name:os.system", "module:os"]
)
def test_python_tags_are_refused_and_not_run(write: Write, tmp_path: Path, tag: str) -> None:
    witness = tmp_path / "witness"
    text = f"!!python/{tag.format(witness)}"
    for line in (refusal(write(f"name: {text}")), refusal(write(""), f"name={text}")):
        assert "could not determine a constructor for the tag 'tag:yaml.org,2002:python/" in line
        assert "\n" not in line
    assert not witness.exists()


@pytest.mark.parametrize(("text", "kind"), [("[1, 2]", "[1, 2]"), ("hello", "'hello'"), ("3", "3"), ("true", "true")])
def test_a_file_that_is_no_mapping(write: Write, text: str, kind: str) -> None:
    path = write(text)
    assert refusal(path) == f"config: got {str(path)!r}, but a config is a mapping of sections, not {kind}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x80\x81\xff\x00")
    assert refusal(tmp_path / "gone") == f"config: got {str(tmp_path / 'gone')!r}, but there is no such file"
    for path in (tmp_path / "binary", tmp_path):
        line = refusal(path)
        assert line.startswith(f"config: got {str(path)!r}, but it cannot be read as text (")
        assert "\n" not in line


def test_aliases_cannot_blow_up_a_refusal(write: Write) -> None:
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 6))
    text = f"l0: &l0 [x, x]\n{levels}\nname: *l5"
    assert max(map(len, refusal(write(text)).splitlines())) < 2000


# Overrides


def test_overrides_set_and_add(write: Write) -> None:
    path = write("client: {lr: 0.5}\nserver:\n")
    experiment = load_config(
        path,
        [
            "client.lr=1e-2",
            "server.rounds=7",
            "wire.up.density=0.25",
            "eval.early_stop.patience=4",
            "lora.target_modules=[query, value]",
            "method.mask=fixed",
            "data={examples: 9}",
            "model.name=a=b",
            " name = spaced ",
        ],
    )
    assert experiment.client.lr == 0.01
    assert experiment.server.rounds == 7
    assert experiment.wire.up.density == 0.25
    assert experiment.eval.early_stop
    assert experiment.eval.early_stop.patience == 4
    assert experiment.lora.target_modules == ("query", "value")
    assert experiment.method.options == {"mask": "fixed"}
    assert experiment.data.examples == 9
    assert experiment.model.name == "a=b"
    assert experiment.name == "spaced"


def test_the_last_override_counts(empty: Path) -> None:
    assert load_config(empty, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["", "seed", "=3", "client.=3", ".lr=3", "a..b=3", "."])
def test_what_is_no_override(empty: Path, override: str) -> None:
    assert refusal(empty, override) == (
        f"override: got {override!r}, but an override is written key=value, such as server.rounds=20"
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed.x=1", "seed.x: got 'seed.x=1', but seed is the value 5"),
        ("client.lr.x=1", "client.lr.x: got 'client.lr.x=1', but client.lr is the value 0.5"),
        ("client.optimizer=SDG", "client.optimizer: got 'SDG', but it should be sgd or adamw; did you mean sgd?"),
        ("wire.up.values=fp23", "wire.up.values: got 'fp23', but it should be fp32, "),
        ("client=[1]", "client: got [1], but it should be a section with the keys optimizer, lr, "),
        ("client.lr=[", "override client.lr: not valid YAML: "),
        ("client.lr=", "client.lr: got null, but it should be a number in [1e-30, 1e+30]"),
        ("client.lr=fast", "client.lr: got 'fast', but it should be a number in [1e-30, 1e+30]"),
        ("eval.early_stop.min_delta=0", "eval.early_stop.patience: missing, and there is no default; it should be an "),
        ("a\nb=1", "'a\\nb': unknown key; "),
        ("a\nb=[", "override 'a\\nb': not valid YAML: "),
    ],
)
def test_an_override_that_is_wrong_is_one_line(write: Write, override: str, line: str) -> None:
    said = refusal(write("seed: 5\nclient: {lr: 0.5}"), override)
    assert said.startswith(line)
    assert "\n" not in said


# Unknown keys


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("client: {bach_size: 3}", "client.bach_size: unknown key; did you mean client.batch_size? (allowed are "),
        ("sever: {rounds: 3}", "sever: unknown key; did you mean server? (allowed are name, seed, data, "),
        ("wire: {up: {densty: 1}}", "wire.up.densty: unknown key; did you mean wire.up.density? (allowed are "),
        ("rank: 3", "rank: unknown key; did you mean lora.rank?"),
        ("client: {rounds: 3}", "client.rounds: unknown key; did you mean server.rounds?"),
        ("density: 1", "density: unknown key; did you mean wire.down.density or wire.up.density?"),
        ("wire.up.density: 1", "wire.up.density: unknown key; in YAML each part of a name is a level of its own: "
                               "wire: {up: {density: ...}}"),
        ("checkpoint: {qqqq: 1}", "checkpoint.qqqq: unknown key; allowed are every, keep"),
        ("eval: {early_stop: {patience: 1, qqqq: 1}}", "eval.early_stop.qqqq: unknown key; allowed are patience, min_"),
        ("client: {1: 2}", "client.1: unknown key; a key is a string"),
        ("method: {1: 2}", "method.1: unknown key; a key is a string"),
        ('"a\\nb": 1', "'a\\nb': unknown key; "),
    ],
)  # fmt: skip
def test_unknown_keys_say_what_was_meant(write: Write, text: str, line: str) -> None:
    said = refusal(write(text))
    assert said.startswith(line)
    assert "\n" not in said


def test_every_mistake_has_its_line(write: Write) -> None:
    lines = refusal(write("client: {lr: 0, bach_size: 3}\nlora: {rank: x}"), "wire.up.density=2").splitlines()
    assert [line.split(":")[0] for line in lines] == ["lora.rank", "wire.up.density", "client.lr", "client.bach_size"]


# Writing


@pytest.mark.parametrize(
    "name", ["off", "1e-3", "1e5", "010", "12:30", "2024-01-02", "null", "~", "", "7", "true", "<<"]
)
def test_words_that_look_like_values_survive_the_round_trip(name: str, write: Write) -> None:
    experiment = Experiment(name=name)
    assert load_config(write(dump_config(experiment))).name == name
    assert yaml.safe_load(dump_config(experiment))["name"] == name  # and any other YAML reader


PRINTABLE = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp")), max_size=20)


@given(name=PRINTABLE, lr=st.floats(min_value=1e-30, max_value=1e30))
@example(name="a\u00a0 \u3000b", lr=1.0)
def test_whatever_is_written_reads_back_equal(empty: Path, name: str, lr: float) -> None:
    experiment = Experiment.model_validate({"name": name, "client": {"lr": lr}, "model": {"name": name}})
    path = empty.with_name("written.yaml")
    path.write_text(dump_config(experiment), encoding="utf-8", newline="")
    again = load_config(path)
    assert again == experiment
    assert again.digest() == experiment.digest()


def test_a_full_config_reads_back_equal(write: Write) -> None:
    experiment = load_config(
        ROOT / "configs" / "quickstart.yaml",
        [
            "lora.target_modules=[a, b]",
            "lora.layers_to_transform=[0, 3]",
            "eval.early_stop={patience: 2, min_delta: 0.01}",
            "server.betas=[0, 0.5]",
            "tracking.tags=['1e-3', off]",
            "method={name: flasc, mask: fixed, strange: [1, {a: null}]}",
            "client.clip_norm=1e-7",
            "name='Zoë 🙂'",
        ],
    )
    again = load_config(write(dump_config(experiment)))
    assert again == experiment
    assert again.digest() == experiment.digest()


# Whatever one types


YAMLISH = st.text(alphabet="aeE0159-+._:,[]{}'\"#&*!|>%@` \n\t~<=?", max_size=12)


@given(override=st.one_of(st.text(max_size=30), st.builds("{}={}".format, YAMLISH, YAMLISH)))
def test_no_override_raises_anything_but_a_refusal(empty: Path, override: str) -> None:
    with contextlib.suppress(UserError):
        load_config(empty, [override])


@given(name=st.sampled_from(LEAVES), text=st.one_of(YAMLISH, st.text(max_size=12)))
def test_a_wrong_value_of_one_setting_is_one_line(empty: Path, name: str, text: str) -> None:
    lines: list[str] = []
    try:
        load_config(empty, ["eval={early_stop: {patience: 1}}", f"{name}={text}"])
    except UserError as error:
        lines = str(error).splitlines()
    assert len(lines) <= 1
