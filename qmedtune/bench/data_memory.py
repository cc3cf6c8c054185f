"""Peak memory of the data steps over the size of the corpus: `qmedtune bench data --cases memory`.

Each size is made anew (invented words, one text in twenty an edited copy of an earlier one), read, cleaned, searched
for duplicates, tokenised and packed in a process of its own, and the operating system says what it took at most.
Flat over the sizes is the claim; what grows is 30 bytes per record and the pieces of the packing.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from qmedtune.bench.result import Row
from qmedtune.data.packing.tokens import Codec, load_codec
from qmedtune.errors import RunError

SIZES_MB = (64, 256, 1024)
WORDS, TEXT_WORDS, COPIES = 5_000, 220, 0.05
SEED = 11
VOCABULARY = 8000
MB = 1_000_000
KIB = 1024  # Linux counts ru_maxrss in these


def memory_rows(sizes_mb: list[int], folder: Path) -> list[Row]:
    """One row per size: `value` is the peak of the process and of all its workers, in MB. RunError where one fails."""
    return [_row(size, folder / str(size)) for size in sizes_mb]


def _row(size_mb: int, folder: Path) -> Row:
    folder.mkdir(parents=True)
    texts = make_corpus(folder / "corpus.jsonl", size_mb * MB)
    started = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-m", "qmedtune.bench.data_memory", str(folder)], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise RunError(f"bench data memory: {size_mb} MB failed\n{ran.stderr.strip()[-400:]}")
    found = json.loads(ran.stdout.splitlines()[-1])
    seconds = time.perf_counter() - started
    return {
        "case": "memory", "contender": f"{size_mb} MB", "value": round(found["peak_bytes"] / MB), "unit": "MB",
        "ratio": None, "recall": None, "mb_per_s": size_mb / seconds, "texts": texts, **found,
    }  # fmt: skip


def make_corpus(path: Path, size_bytes: int) -> int:
    """Write JSON lines of about `size_bytes`; the number of texts."""
    rng = random.Random(SEED)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 11))) for _ in range(WORDS)]
    size, number, earlier = 0, 0, ""
    with path.open("w", encoding="utf-8") as file:
        while size < size_bytes:
            text = " ".join(rng.choices(words, k=TEXT_WORDS))
            if earlier and rng.random() < COPIES:
                text = f"{earlier} {rng.choice(words)}"
            size += file.write(json.dumps({"text": text}) + "\n")
            number += 1
            earlier = text if rng.random() < 0.5 else earlier
    return number


def measure(folder: Path) -> Row:
    """Prepare and pack the corpus of a folder; peak bytes, with those of the workers, and the counts."""
    from qmedtune.data.hygiene.per_record import worker_count
    from qmedtune.data.packing.pack import StageToPack, pack_stage
    from qmedtune.data.prepare import prepare_source
    from qmedtune.planning.resolve import resolve
    from qmedtune.recipe import Recipe

    asked = Recipe.model_validate({
        "name": "memory", "model": {"base": "builtin:tiny"},
        "data": {"texts": {"path": str(folder / "corpus.jsonl"), "kind": "literature"}},
        "stages": [{"cpt": {"mix": {"texts": 1}, "epochs": 1, "seq_len": 1024}}],
    })  # fmt: skip
    recipe, _ = resolve(asked)
    for name in ("texts", "stage"):
        (folder / name).mkdir()
    records = prepare_source(recipe, "texts", {}, folder / "texts").records
    prepared = _peak(resource.RUSAGE_SELF)
    with (folder / "corpus.jsonl").open(encoding="utf-8") as file:
        train_tokenizer([json.loads(line)["text"] for line, _ in zip(file, range(1000), strict=False)], folder / "t")
    packed = pack_stage(StageToPack(recipe, 0, folder / "t", {"texts": folder / "texts"}), folder / "stage")
    workers = worker_count("auto", [folder / "corpus.jsonl"])
    of_workers = _peak(resource.RUSAGE_CHILDREN) * workers if workers > 1 else 0
    return {
        "peak_bytes": _peak(resource.RUSAGE_SELF) + of_workers, "prepare_bytes": prepared, "worker_bytes": of_workers,
        "workers": workers, "records": records.as_json(), "tokens": packed.tokens.trained,
    }  # fmt: skip


def train_tokenizer(texts: list[str], folder: Path) -> Codec:
    """A byte-level BPE of VOCABULARY tokens, from the first 1,000 texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts[:1000], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return load_codec(folder)


def _peak(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * KIB


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
