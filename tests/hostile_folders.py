"""Hostile model and adapter folders: what a stranger, a bad disk or a careless tool may put into one.

Each case changes a copy of a good folder. `Case.harmless` names those that may be used all the same, because what they
say is not listened to; every other must be refused by every command, by name, in six lines, without running anything.
To judge by hand:  python tests/hostile_folders.py GOOD_MODEL GOOD_ADAPTER OUT
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path], object]
CONFIG, ADAPTER = "config.json", "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TENSORS = "adapter_model.safetensors"
SETTINGS = "tokenizer_config.json"
OWNED = "OWNED"
EVIL = f"open({OWNED!r}, 'w')\n"


@dataclass(frozen=True)
class Case:
    """`asked`: commands that must refuse it where not all do (a template is no business of `merge`)."""

    group: str
    name: str
    change: Change
    harmless: bool = False
    asked: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return f"{self.group}-{self.name}".replace(" ", "_")


def say(name: str = CONFIG, /, **changes: Any) -> Change:
    """Set keys of a JSON file, which is made where it is not there."""

    def change(folder: Path) -> None:
        path = folder / name
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | changes))

    return change


def put(name: str, content: str | bytes) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def gone(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return change


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def unix_socket(folder: Path) -> None:
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket has at most 108 characters
    try:
        socket.socket(socket.AF_UNIX).bind("notes.txt")
    finally:
        os.chdir(here)


# ---- the good ones ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Good:
    """The folders that the cases are made from."""

    model: Path
    adapter: Path


def good_folders(base: Path, out: Path) -> Good:
    """A whole model with two templates, and a plain LoRA on it with numbers in both halves."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qmedtune.data.packing import templates

    model, adapter = out / "good", out / "good-adapter"
    model.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix in (".json", ".safetensors") and path.name != "seal.json":
            shutil.copyfile(path, model / path.name)
    asked = templates.load("alpaca")
    (model / "chat_template.jinja").write_text(asked.jinja())
    templates.save(asked, model)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    trained.save_pretrained(adapter)
    return Good(model, adapter)


# ---- files of weights ------------------------------------------------------------------------------------------------


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def header(change: Callable[[dict[str, Any], list[str]], object], name: str = SINGLE, more: bytes = b"") -> Change:
    """Change a header that is written back with the same data behind it (and `more`)."""

    def apply(folder: Path) -> None:
        entries, data = split(folder / name)
        change(entries, sorted(entries.keys() - {"__metadata__"}))
        text = json.dumps(entries).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data + more)

    return apply


def length(value: int) -> Change:
    def apply(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(struct.pack("<Q", value) + raw[8:])

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = SINGLE) -> Change:
    def apply(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name, metadata={"format": "pt"})

    return apply


def index(file: Any, *, shard: str = "model-00001-of-00001.safetensors") -> Change:
    """One shard, and an index that says `file` for each tensor (a dict: as it is)."""

    def apply(folder: Path) -> None:
        names = load_file(folder / SINGLE).keys()
        (folder / SINGLE).rename(folder / shard)
        said = file if isinstance(file, dict) else {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        (folder / INDEX).write_text(json.dumps(said))

    return apply


def cut(count: int) -> Change:
    def apply(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(raw[:count] if count >= 0 else raw[:count])

    return apply


def to(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(found: dict[str, torch.Tensor]) -> None:
        for name in list(found):
            found[name] = found[name].to(dtype)

    return change


def spoiled(value: float, part: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """One element of the first tensor with `part` in its name."""

    def change(found: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(found) if part in name)
        found[name] = found[name].clone()
        found[name].view(-1)[0] = value

    return change


UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"

# ---- models ----------------------------------------------------------------------------------------------------------

CHAT = ("plan", "run", "predict", "chat", "eval", "export")  # who renders a template
SAVED = ("predict", "chat", "eval", "export")  # who asks in the template beside the weights
LOADERS = ("run", "eval", "predict", "chat", "export")  # who reads the values of weights


def jinja(name: str, text: str) -> Case:
    return Case("template", name, both(gone("template.json"), put("chat_template.jinja", text)), asked=CHAT)


def own(name: str, /, **changes: Any) -> Case:
    return Case("template", name, say("template.json", **changes), asked=SAVED)


def setting(name: str, /, **changes: Any) -> Case:
    return Case("setting", name, say(CONFIG, **changes))


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
MODELS: tuple[Case, ...] = (
    jinja("classes", "{{ ().__class__.__base__.__subclasses__() }}" + TURNS),
    jinja("globals", "{{ self.__init__.__globals__.__builtins__.open('OWNED', 'w') }}" + TURNS),
    jinja("cycler", "{{ cycler.__init__.__globals__.os.system('touch OWNED') }}" + TURNS),
    jinja("lipsum", "{{ lipsum.__globals__['os'].popen('touch OWNED').read() }}" + TURNS),
    jinja("attribute by filter", "{{ messages|attr('__class__')|attr('__mro__') }}" + "{{ raise_exception('no') }}"),
    jinja("import", "{% import 'os' as os %}" + TURNS),
    jinja("from a file", "{% from '/etc/passwd' import x %}" + TURNS),
    jinja("extends", "{% extends '/etc/passwd' %}"),
    jinja("nested loops", "{% for a in range(10**5) %}{% for b in range(10**5) %}{% endfor %}{% endfor %}"),
    jinja("a loop of loops", "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"),
    jinja("a giant word", "{{ 'word' * 400000000 }}"),
    jinja("a giant pad", "{{ 'x'.ljust(1500000000) }}"),
    jinja("a giant format", "{{ '%1500000000d' % 1 }}"),
    jinja("a giant number", "{{ 9**9**9 }}"),
    jinja("calls itself", "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}"),
    jinja("no template", "{{ messages["),
    jinja("an unknown filter", "{{ messages | evil }}"),
    jinja("an unknown test", "{% if messages is evil %}{% endif %}"),
    jinja("no answers", "hello"),
    jinja("other words each time", "{{ messages | random }}"),
    jinja("a refusal in colours", "{{ raise_exception('\x1b[31mread ' ~ messages) }}"),
    Case("template", "no text", both(gone("template.json"), put("chat_template.jinja", b"\xff\xfe\x00")), asked=CHAT),
    Case(
        "template",
        "a number",
        both(gone("template.json"), gone("chat_template.jinja"), say(SETTINGS, chat_template=5)),
        asked=CHAT,
    ),
    Case(
        "template",
        "a list without words",
        both(gone("template.json"), gone("chat_template.jinja"), say(SETTINGS, chat_template=[{"name": "default"}, 5])),
        harmless=True,
    ),
    own("a pad in a form", user="{content:>1500000000}"),
    own("an attribute in a form", user="{content.__class__.__init__.__globals__}"),
    own("an item in a form", user="{content[0]}"),
    own("a conversion", user="{content!r}"),
    own("an open brace", user="{content} {"),
    own("a closed brace", user="} {content}"),
    own("two braces", user="{{content}}"),
    own("said twice", user="{content}{content}"),
    own("a position", user="{0}{content}"),
    own("no words", user="hello"),
    own("a number for a form", user=5),
    own("a list for an end", end=["x"]),
    own("a number for a name", name=7),
    own("a word for marks", stop=5),
    own("marks that are no words", stop=[1, 2]),
    own("a number for a source", source=5),
    own("tokens of three", tokens=[["a", "b", "c"]]),
    own("another end", eos="sometimes"),
    own("encoded otherwise", apart="never"),
    own("a version of the future", version=99),
    own("a version in words", version="2; DROP"),
    own("an unknown key", evil=1),
    Case("template", "a list of templates", put("template.json", "[]"), asked=SAVED),
    Case("template", "too deep", put("template.json", "[" * 200_000), asked=SAVED),
    Case("template", "no JSON", put("template.json", "{'a'"), asked=SAVED),
    # code
    Case("code", "auto_map", both(say(auto_map={"AutoConfig": "evil.C"}), put("evil.py", EVIL))),
    Case("code", "auto_map of a part", both(say(vision_config={"auto_map": {"A": "evil.M"}}), put("evil.py", EVIL))),
    Case("code", "auto_map in a list", say(parts=[{"deep": [{"auto_map": {"A": "evil.M"}}]}])),
    Case("code", "auto_map of a tokenizer", both(say(SETTINGS, auto_map={"AutoTokenizer": ["evil.T", None]}))),
    Case("code", "auto_map of a processor", say("processor_config.json", auto_map={"AutoProcessor": "evil.P"})),
    Case("code", "auto_map of images", say("preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.P"})),
    Case("code", "auto_map of generation", say("generation_config.json", auto_map={"x": "evil.G"})),
    Case("code", "custom_generate", say("generation_config.json", custom_generate="evil/generate")),
    Case("code", "custom_pipelines", say(custom_pipelines={"text-generation": {"impl": "evil.P", "pt": ["A"]}})),
    Case("code", "trust_remote_code", say(trust_remote_code=True)),
    Case("code", "a kernel of the Hub", say(attn_implementation="evil/kernel")),
    Case("code", "a private kernel of the Hub", say(_attn_implementation="evil/kernel@main:f")),
    Case("code", "attention by parts", say(_attn_implementation={"": "evil/kernel"})),
    Case("code", "another attention", say(_attn_implementation="eager", use_kernels=True), harmless=True),
    Case("code", "other weights", both(say(transformers_weights="other.safetensors"), put("other.safetensors", b""))),
    Case("code", "a file of code beside", put("modeling_llama.py", EVIL), harmless=True),
    Case("code", "site customisation", put("sitecustomize.py", EVIL), harmless=True),
    Case("code", "a module of transformers' name", put("transformers/__init__.py", EVIL), harmless=True),
    Case("code", "a pickle beside", put("training_args.bin", b"cos\nsystem\n(S'touch OWNED'\ntR."), harmless=True),
    # settings
    setting("a giant vocabulary", vocab_size=2**40),
    setting("ten million layers", num_hidden_layers=10**7),
    setting("layers below none", num_hidden_layers=-2),
    setting("a width in words", hidden_size="256"),
    setting("a width of nothing", hidden_size=0),
    setting("a broken width", hidden_size=256.5),
    setting("true for a width", intermediate_size=True),
    setting("heads that do not divide", num_attention_heads=7),
    setting("no heads", num_attention_heads=0),
    setting("more key heads than heads", num_key_value_heads=64),
    setting("a list of heads", num_key_value_heads=[1, 2]),
    setting("a width of heads", head_dim=10**9),
    setting("a billion labels", num_labels=10**9),
    setting("positions in words", max_position_embeddings="many"),
    setting("an epsilon that is none", rms_norm_eps="0"),
    setting("an endless epsilon", rms_norm_eps=float("inf")),
    setting("a base of nothing", rope_theta=0.0, rope_parameters=None),
    setting("an unknown rope", rope_parameters={"rope_type": "evil", "rope_theta": 1e4}),
    setting("a rope in words", rope_scaling="linear"),
    setting("a factor that is none", rope_scaling={"rope_type": "linear", "factor": "2"}, rope_parameters=None),
    setting("a rope of a million factors", rope_parameters={"rope_type": "longrope", "long_factor": [1.0] * 10**5}),
    setting("an unknown activation", hidden_act="__import__"),
    setting("an activation that is a list", hidden_act=["silu"]),
    setting("a dtype of torch", dtype="load", torch_dtype="load"),
    setting("a dunder dtype", dtype="__dict__", torch_dtype="__dict__"),
    setting("integers asked for", dtype="int8", torch_dtype="int8"),
    setting("tokens in words", eos_token_id="</s>"),
    setting("tokens in a tree", eos_token_id={"a": 1}),
    setting("biases that are not there", attention_bias=True, mlp_bias=True),
    setting("half a rotation", partial_rotary_factor=0.5),
    setting("another kind", model_type="qwen2"),
    setting("no kind", model_type=None),
    setting("a kind of parts", model_type={"a": "llama"}),
    Case("setting", "an unknown switch", say(evil=True, _name_or_path="/etc/passwd"), harmless=True),
    Case("setting", "a list", put(CONFIG, "[1]")),
    Case("setting", "null", put(CONFIG, "null")),
    Case("setting", "too deep", put(CONFIG, '{"a":' * 100_000)),
    Case("setting", "empty", put(CONFIG, b"")),
    Case("setting", "no text", put(CONFIG, b"\xff\xfe{\x00")),
    Case("setting", "gone", gone(CONFIG)),
    Case("setting", "a pipe", pipe(CONFIG)),
    Case("setting", "a folder", both(gone(CONFIG), put(f"{CONFIG}/x", ""))),
    setting("quantised by another", quantization_config={"quant_method": "awq", "bits": 4}),
    setting("quantised by a stranger", quantization_config={"quant_method": "evil.module"}),
    setting("quantised by nothing", quantization_config=[]),
    setting("quantised in words only", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    setting(
        "quantised by a name of torch",
        quantization_config={"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "os.system"},
    ),
    Case("setting", "generation is a list", put("generation_config.json", "[]")),
    Case("setting", "generation ends in words", say("generation_config.json", eos_token_id="x")),
    Case("setting", "generation is sampled", say("generation_config.json", do_sample=True, top_p=2), harmless=True),
    # weights
    Case("weights", "an endless header", length(2**63)),
    Case("weights", "a header longer than the file", length(10**9)),
    Case("weights", "a header of nothing", length(0)),
    Case("weights", "offsets below none", header(lambda h, k: h[k[0]]["data_offsets"].__setitem__(0, -1))),
    Case("weights", "offsets in words", header(lambda h, k: h[k[0]].update(data_offsets=["0", "8"]))),
    Case("weights", "overlapping", header(lambda h, k: h[k[1]].update(h[k[0]]))),
    Case("weights", "an unknown dtype", header(lambda h, k: h[k[0]].update(dtype="OBJECT"))),
    Case("weights", "a wider dtype", header(lambda h, k: h[k[0]].update(dtype="F64"))),
    Case("weights", "bytes for numbers", header(lambda h, k: h[k[0]].update(dtype="I16"))),
    Case("weights", "a giant shape", header(lambda h, k: h[k[0]].update(shape=[2**40, 2**40]))),
    Case("weights", "one dimension more", header(lambda h, k: h[k[0]].update(shape=[*h[k[0]]["shape"], 1]))),
    Case("weights", "turned", tensors(lambda t: t.update({UP: t[UP].t().contiguous()}))),
    Case("weights", "flat", tensors(lambda t: t.update({UP: t[UP].flatten()}))),
    Case("weights", "a hole at the end", header(lambda h, k: None, more=b"\0" * 64)),
    Case("weights", "renamed", header(lambda h, k: h.update(evil=h.pop(k[0])))),
    Case("weights", "a name with colours", tensors(lambda t: t.update({"\x1b[31mred": torch.zeros(1)}))),
    Case("weights", "a name that leaves", tensors(lambda t: t.update({"../../x": torch.zeros(1)}))),
    Case("weights", "a layer too many", tensors(lambda t: t.update({UP.replace("0", "99"): t[UP].clone()}))),
    Case("weights", "one missing", tensors(lambda t: t.pop(NORM))),
    Case("weights", "none", tensors(lambda t: t.clear())),
    Case("weights", "integers", tensors(to(torch.int32))),
    Case("weights", "doubles", tensors(to(torch.float64))),
    Case("weights", "not a number", tensors(spoiled(float("nan"), "up_proj")), asked=LOADERS),
    Case("weights", "without end", tensors(spoiled(float("inf"), "up_proj")), asked=LOADERS),
    Case("weights", "cut in the header", cut(100)),
    Case("weights", "cut at the end", cut(-1)),
    Case("weights", "empty", cut(0)),
    Case("weights", "a pointer of Git", put(SINGLE, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
    Case("weights", "a page of a proxy", put(SINGLE, "<!doctype html><title>Sign in</title>")),
    Case("weights", "a pickle by that name", put(SINGLE, b"\x80\x04cposix\nsystem\n.")),
    Case("weights", "a zip by that name", put(SINGLE, b"PK\x03\x04" + bytes(60))),
    Case("weights", "a folder", both(gone(SINGLE), put(f"{SINGLE}/x", ""))),
    Case("weights", "a pipe", pipe(SINGLE)),
    Case("weights", "pickled", lambda f: (f / SINGLE).rename(f / "pytorch_model.bin")),
    Case("weights", "pickled with a decoy", both(lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
                                                 put("x.safetensors", b""))),
    Case("weights", "pickled under an index", both(lambda f: (f / SINGLE).rename(f / "pytorch_model-1.bin"),
                                                   say("pytorch_model.bin.index.json", weight_map={"a": "x.bin"}))),
    Case("weights", "shards that leave", index("../good/model.safetensors")),
    Case("weights", "shards by a whole path", index("/etc/passwd")),
    Case("weights", "shards in a folder", index("sub/model.safetensors")),
    Case("weights", "shards in the parent", index("..")),
    Case("weights", "shards that are pickled", index("pytorch_model.bin")),
    Case("weights", "a number for a shard", index(5)),
    Case("weights", "no shard", index(None)),
    Case("weights", "a shard with a zero byte", index("a\0b.safetensors")),
    Case("weights", "a shard that is gone", index("model-00002-of-00002.safetensors")),
    Case("weights", "an index of nothing", index({"weight_map": {}})),
    Case("weights", "an index that is a list", index({"weight_map": [1, 2]})),
    Case("weights", "no index in it", index({"metadata": {}})),
    Case("weights", "an index too deep", both(index({}), put(INDEX, "[" * 100_000))),
    Case("weights", "an index of pipes", both(index("model-00001-of-00001.safetensors"), pipe(INDEX))),
    # links
    Case("link", "weights", link(SINGLE, "../good/model.safetensors")),
    Case("link", "tokenizer", link("tokenizer.json", "/etc/passwd")),
    Case("link", "licence", link("LICENSE", "/etc/passwd")),
    Case("link", "to nothing", link("NOTICE", "/nowhere/at/all")),
    Case("link", "to itself", link("README.md", "README.md")),
    Case("link", "of a folder", link("sub", "/etc")),
    Case("link", "below a folder", link("sub/passwd", "/etc/passwd")),
    Case("link", "of a template", link("additional_chat_templates/x.jinja", "/etc/passwd")),
    Case("link", "a device", link("tokenizer.model", "/dev/zero")),
    Case("link", "a pipe beside", pipe("notes.txt")),
    Case("link", "a socket", unix_socket),
    Case("link", "within", lambda f: (f / "copy.safetensors").symlink_to("config.json"), harmless=True),
    # tokenizer
    Case("tokenizer", "cut", put("tokenizer.json", '{"version": "1.0", "model":'), asked=CHAT),
    Case("tokenizer", "empty", put("tokenizer.json", b""), asked=CHAT),
    Case("tokenizer", "no tokenizer", put("tokenizer.json", '{"a": 1}'), asked=CHAT),
    Case("tokenizer", "too deep", put("tokenizer.json", "[" * 100_000), asked=CHAT),
    Case("tokenizer", "no text", put("tokenizer.json", b"\xff\xfe\x00\x01"), asked=CHAT),
    Case("tokenizer", "gone", gone("tokenizer.json"), asked=CHAT),
    Case("tokenizer", "a pipe", pipe("tokenizer.json")),
    Case("tokenizer", "an unknown kind", lambda f: say("tokenizer.json", model={"type": "Evil", "vocab": {}})(f),
         asked=CHAT),
    Case("tokenizer", "an unknown step", say("tokenizer.json", normalizer={"type": "Evil"}), asked=CHAT),
    Case("tokenizer", "a charsmap of noise", say("tokenizer.json",
         normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA/////w=="}), asked=CHAT),
    Case("tokenizer", "a pattern that is none", say("tokenizer.json",
         normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}), asked=CHAT),
    Case("tokenizer", "a pattern without end", say("tokenizer.json",
         normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}), harmless=True),
    Case("tokenizer", "cut texts", say("tokenizer.json",
         truncation={"max_length": 1, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}), harmless=True),
    Case("tokenizer", "settings are a list", put(SETTINGS, "[]")),
    Case("tokenizer", "settings too deep", put(SETTINGS, "[" * 100_000)),
    Case("tokenizer", "settings are no text", put(SETTINGS, b"\xff\xfe\x00")),
    Case("tokenizer", "no end", say(SETTINGS, eos_token=None), asked=SAVED),
    Case("tokenizer", "a number for an end", say(SETTINGS, eos_token=5)),
    Case("tokenizer", "an end without words", say(SETTINGS, eos_token={"lstrip": False})),
    Case("tokenizer", "a class by its path", say(SETTINGS, tokenizer_class="os.system")),
    Case("tokenizer", "an unknown class", say(SETTINGS, tokenizer_class="EvilTokenizer"), harmless=True),
    Case("tokenizer", "files elsewhere", say(SETTINGS, tokenizer_file="/etc/passwd", vocab_file="/etc/passwd"),
         harmless=True),
    Case("tokenizer", "special tokens are a list", put("special_tokens_map.json", "[]")),
    Case("tokenizer", "added tokens are a list", put("added_tokens.json", "[]")),
    # what is copied into the merged model
    Case("beside", "a folder of licences", put("LICENSES/MIT.txt", "text"), harmless=True),
    Case("beside", "a folder of tokenizers", put("tokenizer_old/tokenizer.json", "{}"), harmless=True),
    Case("beside", "a name with a newline", put("a\nb.txt", "text"), harmless=True),
    Case("beside", "a name with colours", put("\x1b[31mLICENSE", "text"), harmless=True),
)  # fmt: skip

# ---- adapters --------------------------------------------------------------------------------------------------------

LORA_A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


def adapted(name: str, /, **changes: Any) -> Case:
    return Case("adapter", name, say(ADAPTER, **changes))


def lora(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Case:
    return Case("lora", name, tensors(change, TENSORS))


ADAPTERS: tuple[Case, ...] = (
    adapted("no base", base_model_name_or_path=None),
    adapted("an empty base", base_model_name_or_path=""),
    adapted("a number for a base", base_model_name_or_path=5),
    adapted("a base that leaves", base_model_name_or_path="../../../etc"),
    adapted("a base of the root", base_model_name_or_path="/etc"),
    adapted("a base in the web", base_model_name_or_path="https://evil.example/model"),
    adapted("a base of the Hub", base_model_name_or_path="evil/model"),
    adapted("a base that is a file", base_model_name_or_path="file:///etc/passwd"),
    adapted("a base with a zero byte", base_model_name_or_path="a\0b"),
    adapted("a base of many words", base_model_name_or_path="x" * 100_000),
    adapted("megatron", megatron_config={"a": 1}, megatron_core="evil"),
    adapted("a library of its own", auto_mapping={"base_model_class": "X", "parent_library": "evil"}),
    adapted("a mapping in words", auto_mapping="evil"),
    adapted("auto_map", auto_map={"AutoModel": "evil.M"}),
    adapted("trust_remote_code", tokenizer_kwargs={"trust_remote_code": True}),
    adapted("prompt tuning", peft_type="PROMPT_TUNING", tokenizer_name_or_path="evil"),
    adapted("prefix tuning", peft_type="PREFIX_TUNING"),
    adapted("IA3", peft_type="IA3"),
    adapted("XLORA", peft_type="XLORA", adapters={"0": "evil/adapter"}),
    adapted("no method", peft_type=None),
    adapted("an unknown method", peft_type="EVIL"),
    adapted("a list of methods", peft_type=["LORA"]),
    adapted("another task", task_type="SEQ_CLS"),
    adapted("PiSSA", init_lora_weights="pissa_niter_16"),
    adapted("OLoRA", init_lora_weights="olora"),
    adapted("LoftQ", init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
    adapted("CorDA", corda_config={"a": 1}),
    adapted("DoRA", use_dora=True),
    adapted("biases", bias="all"),
    adapted("layers again", layer_replication=[[0, 2], [1, 2]]),
    adapted("parameters", target_parameters=["mlp.experts"]),
    adapted("tokens to train", trainable_token_indices=[1, 2]),
    adapted("a setting of the future", use_magic=True),
    adapted("a rank without end", r=10**9),
    adapted("a rank of nothing", r=0),
    adapted("a rank below none", r=-4),
    adapted("a rank in words", r="4"),
    adapted("another rank", r=5),
    adapted("a broken rank", r=4.5),
    adapted("true for a rank", r=True),
    adapted("an alpha in words", lora_alpha="8"),
    adapted("an endless alpha", lora_alpha=float("inf")),
    adapted("no alpha", lora_alpha=None),
    adapted("targets that are not there", target_modules=["wq", "wk"]),
    adapted("the head alone", target_modules=["lm_head"]),
    adapted("no targets", target_modules=[]),
    adapted("a number for targets", target_modules=5),
    adapted("targets by a slow pattern", target_modules="(.*_proj)*(.*a)*(.*b)*(.*c)*!"),
    adapted("left out by a slow pattern", exclude_modules="((a|.)*)*!"),
    adapted("layers by a slow pattern", layers_to_transform=[0], layers_pattern="(l|a|y|e|r|s|.)*!"),
    adapted("ranks by a slow pattern", rank_pattern={"((m|o|.)*)*!": 8}),
    adapted("a pattern that is none", target_modules="(q_proj"),
    adapted("ranks by a pattern that is none", rank_pattern={"(q": 8}),
    adapted("ranks in words", rank_pattern={"q_proj": "8"}),
    adapted("a rank pattern of another rank", rank_pattern={"up_proj": 64}),
    adapted("alphas that are none", alpha_pattern={"up_proj": float("nan")}),
    adapted("layers in words", layers_to_transform="all"),
    adapted("copies in words", modules_to_save="lm_head"),
    adapted("copies that are missing", modules_to_save=["lm_head"]),
    Case("adapter", "a list", put(ADAPTER, "[]")),
    Case("adapter", "too deep", put(ADAPTER, '{"a":' * 100_000)),
    Case("adapter", "no text", put(ADAPTER, b"\xff\xfe")),
    Case("adapter", "empty", put(ADAPTER, b"")),
    Case("adapter", "pickled", lambda f: (f / TENSORS).rename(f / "adapter_model.bin")),
    Case("adapter", "pickled with a decoy", both(lambda f: (f / TENSORS).rename(f / "adapter_model.bin"),
                                                 put("x.safetensors", b""))),
    Case("adapter", "pickled and whole", put("adapter_model.bin", b"cposix\nsystem\n(S'touch OWNED'\ntR."),
         harmless=True),
    Case("adapter", "a link", link(TENSORS, "/etc/passwd")),
    Case("adapter", "a pipe", pipe(TENSORS)),
    Case("adapter", "a pipe beside", pipe("README.md")),
    Case("adapter", "tensors are a folder", both(gone(TENSORS), put(f"{TENSORS}/x", ""))),
    Case("adapter", "cut", lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-5])),
    lora("none", lambda t: t.clear()),
    lora("one missing", lambda t: t.pop(LORA_A)),
    lora("a stranger", lambda t: t.update({"base_model.model.evil.lora_A.weight": torch.zeros(2, 2)})),
    lora("a stranger with colours", lambda t: t.update({"\x1b[31mx": torch.zeros(1)})),
    lora("a copy that is not listed", lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)})),
    lora("integers", to(torch.int32)),
    lora("doubles", to(torch.float64)),
    lora("cut columns", lambda t: t.update({LORA_A: t[LORA_A][:, 1:].clone()})),
    lora("turned", lambda t: t.update({LORA_A: t[LORA_A].t().contiguous()})),
    lora("not a number", spoiled(float("nan"), "lora_B")),
    lora("without end", spoiled(float("inf"), "lora_A")),
    Case("origin", "empty", put("trained_on.json", "{}")),
    Case("origin", "a list", put("trained_on.json", "[]")),
    Case("origin", "too deep", put("trained_on.json", "[" * 100_000)),
    Case("origin", "no JSON", put("trained_on.json", "{")),
    Case("origin", "another base", put("trained_on.json", json.dumps(
        {"base": "x", "sha256": "0" * 64, "adapters_below": []}))),
    Case("origin", "on top of others", put("trained_on.json", json.dumps(
        {"base": "x", "sha256": "0" * 64, "adapters_below": ["0" * 64]}))),
    Case("origin", "another kind", put("trained_on.json", json.dumps(
        {"base": 1, "sha256": [], "adapters_below": {}}))),
    Case("origin", "a pipe", pipe("trained_on.json")),
)  # fmt: skip


def make(case: Case, good: Path, out: Path) -> Path:
    """The folder of a case, from a copy of a good one."""
    folder = out / case.folder
    shutil.copytree(good, folder)
    case.change(folder)
    return folder


def all_cases() -> Iterator[tuple[str, Case]]:
    for case in MODELS:
        yield "model", case
    for case in ADAPTERS:
        yield "adapter", case


if __name__ == "__main__":
    sources = {"model": Path(sys.argv[1]), "adapter": Path(sys.argv[2])}
    for kind, each in all_cases():
        make(each, sources[kind], Path(sys.argv[3]))
