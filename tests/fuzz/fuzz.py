"""Fuzz the parsers of untrusted bytes, guided by coverage where atheris is installed (`pip install atheris`).

    python tests/fuzz/fuzz.py --seconds 600               # every target, ten minutes each
    python tests/fuzz/fuzz.py recipe csv --seconds 60
    python tests/fuzz/fuzz.py recipe --input FILE         # one input again

Without atheris the same targets are given mutations of their seeds, which coverage does not guide. Findings lie in
--out; the exit code is 1 where there are any.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
NOISE = (
    b'"', b"{", b"}", b"[", b"]", b"<", b">", b"&", b"\0", b"\xff", b"\n", b"\r", b"-", b"1e999", b"null", b"\\u",
    b"\xef\xbb\xbf",
)  # fmt: skip


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """One to eight cuts, doublings, flips and insertions."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 8)):
        at, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        action = rng.randrange(5)
        if action == 0:
            del data[at : min(end, at + 40)]
        elif action == 1:
            data[at:at] = data[at : min(end, at + 200)]
        elif action == 2 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif action == 3:
            data[at:at] = rng.choice(NOISE) * rng.choice((1, 1, 1, 3, 400))
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
    return bytes(data[: 1 << 16])


def mutate(name: str, seconds: float, seed: int = 1, most: int = sys.maxsize) -> tuple[int, list[tuple[bytes, str]]]:
    """(inputs tried, findings) within some seconds, without coverage."""
    from targets import TARGETS, run, seeds

    rng, found, tried = random.Random(f"{name} {seed}"), [], 0
    corpus, until = seeds(name), time.monotonic() + seconds
    while tried < most and time.monotonic() < until:
        data = corpus[tried] if tried < len(corpus) else mutated(rng.choice(corpus), rng)
        begin = time.monotonic()
        try:
            run(TARGETS[name], data)
        except Exception:
            found.append((data, traceback.format_exc()))
        if time.monotonic() - begin > 60:
            found.append((data, "took more than a minute"))
        tried += 1
    return tried, found


def guided(name: str, seconds: int, out: Path) -> int:
    """Of a process of its own, for atheris ends it: its exit code."""
    corpus = out / name.replace(" ", "_")
    corpus.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, name, "--guided", str(corpus), f"-max_total_time={seconds}", "-timeout=60",
               "-rss_limit_mb=4096", "-max_len=65536", f"-artifact_prefix={corpus}-finding-"]  # fmt: skip
    with (out / f"{corpus.name}.log").open("w") as log:
        return subprocess.run([*command, str(corpus)], stdout=log, stderr=log, check=False).returncode


def with_atheris(name: str, corpus: Path, options: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["qmedtune"]):
        from targets import TARGETS, run, seeds

        import qmedtune.data.hygiene.phi
        import qmedtune.data.packing.chat_renderer
        import qmedtune.data.packing.tokens
        import qmedtune.data.reading.sources
        import qmedtune.model_stack
        import qmedtune.parsing.loader  # noqa: F401
    for number, seed in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    target = TARGETS[name]
    run(target, seeds(name)[0])  # what is imported and made once, on a busy machine, is no input that takes a minute
    atheris.Setup([__file__, *options], lambda data: run(target, data))
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("fuzzing"))
    parser.add_argument("--input", type=Path)
    parser.add_argument("--guided", type=Path, help=argparse.SUPPRESS)
    asked, options = parser.parse_known_args()
    if asked.guided:
        return with_atheris(asked.targets[0], asked.guided, options)
    from targets import TARGETS, run

    if asked.input:
        return run(TARGETS[asked.targets[0]], asked.input.read_bytes())
    asked.out.mkdir(parents=True, exist_ok=True)
    findings = 0
    for name in asked.targets or TARGETS:
        if find_spec("atheris"):
            code = guided(name, asked.seconds, asked.out)
            print(
                f"{name}: {'a finding' if code else 'nothing found'} in {asked.seconds} s, see {asked.out}", flush=True
            )
            findings += code != 0
            continue
        tried, found = mutate(name, asked.seconds)
        print(
            f"{name}: {len(found)} findings in {tried:,} mutations (no atheris here: not guided by coverage)",
            flush=True,
        )
        for number, (data, said) in enumerate(found):
            (asked.out / f"{name}-finding-{number}").write_bytes(data)
            print(said)
        findings += len(found)
    sys.exit(findings > 0)


if __name__ == "__main__":
    main()
