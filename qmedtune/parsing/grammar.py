"""What the schema allows at a place, in words, and the nearest right word to a wrong one.

Everything is read from the JSON Schema of `Recipe` (what `qmedtune schema` prints), so that messages cannot drift from
the models. Deliberately not here: any knowledge of single keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import cast

from qmedtune.parsing.strict_yaml import KeyPath, Tree
from qmedtune.recipe import Recipe

Schema = Tree
# What other trainers call a key, for people who come from them.
OTHER_NAMES = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "num_epochs": "epochs", "max_steps": "tokens",
    "max_seq_length": "seq_len", "max_seq_len": "seq_len", "max_length": "seq_len", "sequence_len": "seq_len",
    "cutoff_len": "seq_len", "block_size": "seq_len", "per_device_train_batch_size": "micro_batch",
    "micro_batch_size": "micro_batch", "gradient_accumulation_steps": "batch", "batch_size": "batch",
    "lora_r": "r", "rank": "r", "lora_rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "target_modules": "targets", "lora_target_modules": "targets", "lora_target": "targets", "use_rslora": "rslora",
    "load_in_4bit": "quantization", "bnb_4bit_use_double_quant": "double_quantization", "dtype": "compute_dtype",
    "bf16": "compute_dtype", "fp16": "compute_dtype", "attn_implementation": "attention", "warmup_ratio": "warmup",
    "warmup_steps": "warmup", "lr_scheduler_type": "schedule", "lr_scheduler": "schedule", "optim": "optimizer",
    "gradient_clipping": "max_grad_norm", "eval_steps": "every", "save_steps": "every", "save_total_limit": "keep",
    "base_model": "base", "model_name_or_path": "base", "model_name": "base", "datasets": "data", "dataset": "data",
    "chat_template": "template", "prompt_template": "template", "val_set_size": "holdout", "test_size": "holdout",
    "sample_packing": "packing", "train_on_inputs": "loss_on", "modules_to_save": "train_embeddings",
    "report_to": "track", "wandb_project": "track", "mixture": "mix", "num_workers": "workers",
}  # fmt: skip


@cache
def json_schema() -> Schema:
    """The JSON Schema of a recipe, as editors read it."""
    schema = Recipe.model_json_schema(by_alias=True)
    _on_one_line(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _on_one_line(node: object) -> None:
    """Descriptions are broken where the source is; editors break them where they like."""
    if isinstance(node, list):
        for item in cast(list[object], node):
            _on_one_line(item)
    if not isinstance(node, dict):
        return
    section = cast(dict[str, object], node)
    text = section.get("description")
    if isinstance(text, str):
        section["description"] = " ".join(text.split())
    for child in section.values():
        _on_one_line(child)


def key_paths() -> list[tuple[str, ...]]:
    """Every key of the schema with its section path; `*` stands for a name, `[]` for a list item."""
    return list(_walk(json_schema(), ()))


def _walk(schema: Schema, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for option in _options(schema):
        for key, child in option.get("properties", {}).items():
            yield (*path, key)
            yield from _walk(child, (*path, key))
        if isinstance(child := _named(option), dict):
            yield from _walk(child, (*path, "*"))
        if "items" in option:
            yield from _walk(option["items"], (*path, "[]"))


def _options(schema: Schema) -> list[Schema]:
    """The alternatives of a schema, references followed; a plain schema is its own only one."""
    while "$ref" in schema:
        schema = json_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" not in schema:
        return [schema]
    options: list[Schema] = []
    for part in schema["anyOf"]:
        options += _options(part)
    return options


def _named(schema: Schema) -> Schema | None:
    """The schema of the values of a mapping with free names, such as `data:` or `mix:`."""
    for pattern in schema.get("patternProperties", {}).values():
        return pattern
    extra = schema.get("additionalProperties")
    return extra if isinstance(extra, dict) else None


def schemas_at(path: KeyPath) -> list[Schema]:
    """The alternatives that the schema allows at `path`; empty where the path is unknown."""
    options = _options(json_schema())
    for key in path:
        deeper: list[Schema] = []
        for option in options:
            if child := _child(option, key):
                deeper += _options(child)
        options = deeper
    return options


def _child(schema: Schema, key: str | int) -> Schema | None:
    if isinstance(key, int):
        fixed = schema.get("prefixItems", [])
        return fixed[key] if key < len(fixed) else schema.get("items")
    return schema.get("properties", {}).get(key) or _named(schema)


def keys_at(path: KeyPath) -> list[str]:
    """The keys of the section at `path`."""
    keys: list[str] = []
    for option in schemas_at(path):
        keys += option.get("properties", {})
    return keys


def words_at(path: KeyPath) -> list[str]:
    """The fixed words that may stand at `path`."""
    words: list[str] = []
    for option in schemas_at(path):
        for word in option.get("enum", []):
            words.append(str(word))
        words.append(str(option.get("const", "")))
    return words


def homes_of(key: str) -> list[str]:
    """The sections that have `key`, as people write them: `stages[].cpt`."""
    homes: list[str] = []
    for path in key_paths():
        if path[-1] == key:
            section = ".".join(path[:-1]).replace(".[]", "[]")
            homes.append(section or "the top level")
    return homes


def allowed(path: KeyPath) -> str:
    """What may stand at `path`, in words: `a number in (0, 1] or auto`."""
    return _any_of(schemas_at(path))


def _any_of(options: Iterable[Schema]) -> str:
    """Each in words, once."""
    words: list[str] = []
    for option in options:
        word = _describe(option)
        if word and word not in words:
            words.append(word)
    return _either(words)


def _describe(schema: Schema) -> str:
    if "enum" in schema:
        return _either([str(value) for value in schema["enum"]])
    if "const" in schema:
        word = str(schema["const"])
        return word.lower() if isinstance(schema["const"], bool) else word
    match schema.get("type"):
        case "integer":
            return _interval(schema, "a whole number")
        case "number":
            return _interval(schema, "a number")
        case "string" if "pattern" in schema:
            return "letters, digits, `_`, `-`, `.` (first a letter or digit)"
        case "string":
            return "text"
        case "array":
            return _list_of(schema)
        case "object":
            return _section(schema)
        case "boolean":
            return "true or false"
        case _:
            return ""


def _interval(schema: Schema, noun: str) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    left = right = from_here = ""
    if above is not None:
        left, from_here = f"({above:.10g}", f" above {above:g}"
    elif low is not None:
        left, from_here = f"[{low:.10g}", f" from {low:g} up"
    if below is not None:
        right = f"{below:.10g})"
    elif high is not None:
        right = f"{high:g}]"
    if left and right:
        return f"{noun} in {left}, {right}"
    return noun + from_here


def _list_of(schema: Schema) -> str:
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])} numbers"
    return f"a list of {_any_of(_options(schema['items']))}"


def _section(schema: Schema) -> str:
    if (named := _named(schema)) is not None:
        return f"names with {_any_of(_options(named))} each"
    keys = list(schema.get("properties", {}))
    shown = "a section with " + ", ".join(keys[:4])
    return f"{shown} ..." if len(keys) > 4 else shown


def _either(words: Sequence[str]) -> str:
    """`a, b or c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} or {words[-1]}"


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """The known words at the smallest edit distance, if that is small enough to be a slip of the hand."""
    best = max(1, min(3, len(word) // 2))
    found: dict[str, None] = {}
    for candidate in known:
        distance = edit_distance(word.lower(), candidate.lower())
        if distance < best:
            best, found = distance, {}
        if distance == best:
            found[candidate] = None
    return list(found)


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours (optimal string alignment)."""
    a, b = a[:64], b[:64]
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean `a` or `b`?`, or nothing."""
    known = list(known)
    found = nearest(word, known)
    if word not in known and OTHER_NAMES.get(word.lower()) in known:
        found = [OTHER_NAMES[word.lower()]]
    if not found:
        return ""
    return f"; did you mean {_either([f'`{name}`' for name in found])}?"
