"""The sections that say what a run learns, and on which model: data, problem, partition, model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rayfed.config.class_sequence import ClassSequence
from rayfed.config.describe import mistake
from rayfed.config.types import (
    UNSIGNED,
    Clients,
    DecidesModel,
    DecidesNothing,
    Fraction,
    OwnClass,
    Printable,
    Section,
    Share,
    Text,
)  # fmt: skip

OBJECT = "object"  # the name of a model that was given in Python
Template = Annotated[str, AfterValidator(Printable(10_000, but="\n"))]
Size = Annotated[int, Field(ge=1, le=10_000)]


class Data(Section):
    """What is learned, and where the texts come from."""

    decides = ("data", "model")  # the model: its kind, the number of classes, the longest input

    task: Literal[
        "text_classification", "multi_label", "regression", "causal_lm", "instruction", "image_classification",
        "image_multi_label",
    ] = "text_classification"  # fmt: skip
    """`text_classification`: one label a text; `multi_label`: any number of labels a text; `regression`: a number a
    text; `causal_lm`: the next token; `instruction`: the response to a prompt; `image_classification`: one label an
    image; `image_multi_label`: any number of labels an image. Ignored where `source` is a task itself: `lowrank`, or an
    import path.
    """
    source: Literal["stdlib", "files", "hub", "lowrank", "object"] | OwnClass = "stdlib"
    """`stdlib`: functions of Python's standard library, labelled by module (no download); `files`: local JSONL, CSV or
    Parquet; `hub`: a Hugging Face data set; `lowrank`: a regression problem with a known answer, see the section
    `problem`; `object`: rows that were given in Python, `rayfed.run(..., task=...)`; an import path: a task of your
    own, a subclass of rayfed.Task.
    """
    path: Text | None = None
    """For `files`: a folder with train.*, test.* and optionally validation.*, or one file. For images also a folder of
    images, `train/CLASS/` and `test/CLASS/`, or `CLASS/` alone.
    """
    name: Text | None = None
    """For `hub`: name of the data set, such as `PolyAI/banking77`."""
    subset: Text | None = None
    """For `hub`: configuration of the data set, if there are several."""
    text: Text = "text"
    """The column with the text."""
    text_pair: Text | None = None
    """For text_classification, multi_label and regression: the column with a second text, as GLUE's pairs have one. The
    tokenizer joins the two as it joins pairs, and cuts the longer one first.
    """
    image: Text = "image"
    """For images: the column with the image: its encoded bytes, a struct of bytes and path (as datasets
    stores an Image), or its path, relative to the file.
    """
    label: Text = "label"
    """The column with the label: an integer or a string. multi_label: a list of these, in CSV separated by commas;
    regression: a number; causal_lm and instruction read it only for a partition by label.
    """
    prompt: Text = "prompt"
    """For instruction: the column with the prompt."""
    response: Text = "response"
    """For instruction: the column with the response."""
    messages: Text | None = None
    """For instruction, in place of `prompt` and `response`: the column with a chat, a list of mappings with `role` and
    `content`. The last message is the assistant's, and is the response; all messages before are the prompt.
    """
    prompt_template: Template | None = None
    """For instruction: the text of a prompt, with `{prompt}` in place of the column's value; the response follows.
    null: the tokenizer's chat template, or `{prompt}` and a line end where the tokenizer has none.
    """
    client: Text | None = None
    """The column with a row's client, for partition.kind=natural, or with its domain, for partition.kind=domain."""
    validation: Share = 0.1
    """Share of the training rows used for validation, if the source has no validation split."""
    test: Share = 0.2
    """Share of all rows used for the test, if the source has no test split."""
    examples: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Rows of the source to use, without those of its test split; null: all."""
    test_examples: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Rows of the source's test split to use; null: all. Refused where the source has no test split."""
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Most tokens per text, or per prompt and response together; what is longer is cut. With `packing`: tokens per
    block.
    """
    packing: bool = False
    """For causal_lm: the texts of a client are joined, an end-of-text token after each, and cut into blocks of
    `max_tokens`. Nothing of a text is lost, and a token also sees the texts before its own in the block.
    """
    crop: Annotated[int, Field(ge=0, le=10_000)] = 0
    """For images: every training image is moved at random by up to this many pixels of the model's input,
    in both directions; what is uncovered is black. 0: no image is moved.
    """
    flip: bool = False
    """For images: half of the training images, drawn anew in every step, are mirrored left to right."""
    pretrain_share: Fraction = 0.0
    """Share of the source's training rows that no client has: those on which `rayfed pretrain` trains. A hash of a
    row's text or image decides, so they are the same rows for every `seed`, and equal rows stay together.
    """
    fingerprint: Text | None = None
    """Of a task that was given in Python, its class and a hash of its content: rayfed writes it into config.yaml, and
    whoever resumes the run gives an equal task again. null: the settings say everything.
    """

    @property
    def own_task(self) -> bool:
        """Whether `source` is the import path of a task."""
        return ":" in self.source

    @property
    def task_class(self) -> str:
        """The task of these data: its file in `rayfed.tasks`, or the import path of a class of the user's own."""
        if self.own_task:
            return self.source
        return "low_rank_regression" if self.source == "lowrank" else self.task

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the task reads, in the order in which a row that is a tuple has them."""
        if self.task == "instruction":
            names = (*((self.messages,) if self.messages else (self.prompt, self.response)), self.client, self.label)
        else:
            names = (self.image if self.images else self.text, self.text_pair, self.label, self.client)
        return tuple(name for name in names if name)

    @property
    def images(self) -> bool:
        """Whether rows are images."""
        return self.task in ("image_classification", "image_multi_label")

    @property
    def nested(self) -> tuple[str, ...]:
        """The columns whose values may be lists or structs."""
        lists = {"instruction": self.messages, "multi_label": self.label, "image_multi_label": self.label}
        return tuple(name for name in (lists.get(self.task), self.image if self.images else None) if name)

    def mistakes(self) -> Iterator[str]:
        if not self.own_task:
            yield from self._task_mistakes()
        if self.prompt_template is not None:
            if self.messages is not None:
                yield mistake("data.prompt_template", self.prompt_template, "data.messages are chats")
            if self.prompt_template.count("{prompt}") != 1:
                yield mistake("data.prompt_template", self.prompt_template, "it has {prompt} once")
        if self.source == "files" and not self.path:
            yield mistake("data.path", None, "data.source=files needs a folder or a file")
        if self.source == "object" and not self.fingerprint:
            yield mistake("data.source", "object", "Python objects come with rayfed.run(..., task=...)")
        if self.source == "hub" and not self.name:
            yield mistake("data.name", None, "data.source=hub needs the name of a data set")

    def _task_mistakes(self) -> Iterator[str]:
        """Settings of a task or a source beside another one. A user's own task may have any."""
        if self.packing and self.task_class != "causal_lm":
            yield mistake("data.packing", True, "only data.task=causal_lm joins texts")
        for field in ("crop", "flip"):
            if (value := getattr(self, field)) and not self.images:
                yield mistake(f"data.{field}", value, "only tasks on images change images")
        paired = "text_classification", "multi_label", "regression"
        if self.text_pair is not None and self.task_class not in paired:
            what = f"data.task={self.task_class} takes no pairs; allowed with {', '.join(paired)}"
            yield mistake("data.text_pair", self.text_pair, what)
        for field in ("messages", "prompt_template"):
            if (value := getattr(self, field)) is not None and self.task_class != "instruction":
                yield mistake(f"data.{field}", value, "only data.task=instruction has prompts")
        for field, source in (("path", "files"), ("name", "hub"), ("subset", "hub")):
            if (value := getattr(self, field)) is not None and self.source != source:
                what = f"that belongs to data.source={source}, and the source is {self.source}"
                yield mistake(f"data.{field}", value, what)


class Problem(Section):
    """The built-in problem with a known answer (`data.source: lowrank`): low-rank regression on one linear layer.

    Every client has its own quadratic loss; `partition.clients` is the number of clients. The distance from the optimum
    is exact, so no validation or test data are needed.
    """

    decides = ("data", "model")

    outputs: Size = 32
    """Outputs of the layer."""
    inputs: Size = 32
    """Inputs of the layer."""
    true_rank: Size = 12
    """Rank of the optimum."""
    rows: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Rows of data per client; at least `inputs`."""
    condition: Annotated[float, Field(ge=1, le=1e8)] = 10.0
    """Largest over smallest curvature of a client's loss; 1: equal in all directions. Data of float32 have no more."""
    shift: Annotated[float, Field(ge=0, le=1e4), UNSIGNED] = 0.5
    """Distance of each client's optimum from the common optimum, relative to the norm of that. With a larger distance,
    float32 would round the optimum away.
    """

    @property
    def numbers_per_client(self) -> int:
        """The numbers that describe one client: its features, and its distance from the common optimum."""
        return self.inputs * (self.rows + self.outputs)

    def mistakes(self) -> Iterator[str]:
        if self.true_rank > (most := min(self.outputs, self.inputs)):
            has = f"a matrix of {self.outputs} x {self.inputs} has at most rank {most}"
            yield mistake("problem.true_rank", self.true_rank, has)
        if self.rows < self.inputs:
            yield mistake("problem.rows", self.rows, f"at least problem.inputs={self.inputs} are needed")


class Partition(Section):
    """Which client holds which training rows."""

    decides = ("data",)

    kind: Literal["iid", "quantity", "dirichlet", "flasc", "pathological", "shards", "domain", "natural"] = "dirichlet"
    """`iid`: rows at random; `quantity`: rows at random, sizes log-normal; `dirichlet`: label shares of each client
    drawn from Dirichlet(alpha); `flasc`: as in FLASC's code; `pathological`: few classes per client; `shards`: a few
    pieces of the rows in the order of their labels; `domain`: rows of one value of the column `data.client`; `natural`:
    a client is a value of the column `data.client`.
    """
    clients: Clients = 100
    """Clients in the population. Ignored by `natural`, except with data.source=lowrank."""
    alpha: Annotated[float, Field(ge=1e-300, le=1e300)] = 0.1
    """Dirichlet concentration. The smaller, the more clients differ."""
    classes: Annotated[int, Field(ge=1, le=1_000_000)] = 2
    """For `pathological`: classes per client."""
    shards: Annotated[int, Field(ge=1, le=1_000_000)] = 2
    """For `shards`: pieces per client."""
    sigma: Annotated[float, Field(ge=0, le=10), UNSIGNED] = 1.0
    """For `quantity`: standard deviation of the logarithm of a client's size. 0: equal sizes."""
    mix: Annotated[float, Field(ge=0, le=1), UNSIGNED] = 0.0
    """Share of every client's rows, its last ones, that is pooled and dealt out again at random. Sizes stay."""
    sequence: ClassSequence | None = None
    """Clients meet the classes one group after the other (class-incremental learning). null: all at once."""

    @property
    def column(self) -> str | None:
        """What the column `data.client` must name for this kind: the client, the domain, or nothing."""
        return {"natural": "client", "domain": "domain"}.get(self.kind)

    @property
    def by_label(self) -> bool:
        """Whether this kind divides rows by their labels."""
        return self.kind in ("dirichlet", "flasc", "pathological", "shards")


class Model(Section):
    """The frozen base model."""

    decides = ("data", "model")  # the data: the tokens of a text, the longest input

    name: Text = "minilm"
    """`minilm`: the packaged all-MiniLM-L6-v2 (extra `minilm`); else a local folder or a hub name that
    AutoModelForSequenceClassification can load (AutoModelForCausalLM with data.task=causal_lm or instruction,
    AutoModelForImageClassification for images). Ignored by data.source=lowrank, whose model is one layer. `object`: a
    model that was given in Python, `rayfed.run(..., task=...)`.
    """
    pooling: Literal["stock", "mean"] = "stock"
    """`stock`: the model's own classification head; `mean`: the mean over all tokens but the padding, then one linear
    layer.
    """
    normalize: bool = True
    """For pooling=mean: scale features to unit length (L2), times sqrt(width) of the model."""
    head: Literal["trained", "frozen"] = "trained"
    """`trained`: the head trains with the adapters and is sent. `frozen`: every weight matrix of the head is fixed to
    random orthonormal rows, drawn from `seed`; then only adapters learn.
    """
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Number format of the frozen base model and its activations, in training and evaluation. Adapters, head, loss,
    optimizer states and messages are float32 in any case. bfloat16 halves the memory of the base model and is fast on
    devices that compute in it; a client's trained change differs by about 1 percent. auto: bfloat16 if engine.device
    multiplies in it (a CPU with AMX or AVX512_BF16; a GPU of compute capability 8.0 or more, or one that this machine
    lacks), else float32. The choice is made where the settings are read, and config.yaml has it.
    """
    load_in_4bit: bool = False
    """Hold the weights of the base's linear layers in 4 bits (NF4 of bitsandbytes, extra `bitsandbytes`), and compute
    with them in `dtype`. It needs engine.device=cuda. Conv1D layers (GPT-2) are not converted. The exported adapter's
    lines and a merged model take the base as `dtype` has it.
    """
    adapter: DecidesNothing[Text | None] = None
    """Where training starts: a run directory, or a folder with a LoRA in PEFT's format (safetensors). null: at B = 0, a
    random A and a new head. Its layers are those of the run, and its rank is at most lora.rank: further ranks are new.
    Its head is taken where it fits the classes.
    """
    adapter_digest: DecidesModel[Text | None] = None
    """Of the files of `adapter`, a hash: rayfed writes it into config.yaml, and refuses an adapter with another one.
    null: it is computed when the run starts.
    """
    trust_remote_code: bool = False
    """Run the Python code that comes with a hub model. Use it only for models you trust."""
    fingerprint: Text | None = None
    """Of a model that was given in Python (name: object), its class and a hash of its weights and of its tokenizer, as
    in `data.fingerprint`.
    """

    def mistakes(self) -> Iterator[str]:
        if self.name == OBJECT and not self.fingerprint:
            yield mistake("model.name", OBJECT, "Python objects come with rayfed.run(..., task=...)")
        if self.adapter is None and self.adapter_digest is not None:
            yield mistake("model.adapter_digest", self.adapter_digest, "model.adapter is null")
