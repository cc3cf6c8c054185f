"""What all machines of a job must agree on, in one file: recipe, files and their shards, versions, secret, benchmarks.

The machine that starts a job writes it; every task reads it and checks itself against it, so that no shard is made by
other code, of other files or with another secret. Shards are neighbours in the order in which a run would read the
files: put one behind the other they are what one machine reads.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import qmedtune
from qmedtune.data.hygiene import secret
from qmedtune.data.hygiene.benchmarks import benchmark_items
from qmedtune.data.hygiene.decontaminate import BenchmarkItem
from qmedtune.data.hygiene.per_record import phi_mode
from qmedtune.data.reading.listing import by_extension, list_source
from qmedtune.data.reading.sources import reading_order
from qmedtune.disk import owner_only
from qmedtune.errors import DataError, RecipeError, RunError
from qmedtune.hashes import read_checked, sha256_file, sha256_json, write_checked
from qmedtune.recipe import Recipe
from qmedtune.versions import installed

PACKAGES = ("numpy", "rensa", "lxml", "zstandard", "pydantic", "datatrove")
JOB, BENCHMARKS = "job.json", "benchmarks.json"


class PartOfJob(BaseModel):
    model_config = ConfigDict(frozen=True)


class FileSeen(PartOfJob):
    """A file of a source as it was when the job was planned."""

    path: str
    size: int
    mtime_ns: int


class ShardedSource(PartOfJob):
    """The files of each shard, in their order; unread: files that were found and are no data, by extension."""

    shards: list[list[FileSeen]]
    unread: dict[str, int]


class ShardJob(PartOfJob):
    """What `plan_job` wrote. secret: fingerprint of what stand-ins are derived from, where identifiers are replaced;
    benchmarks: sha256 of the items that are looked for."""

    recipe: Recipe
    sources: dict[str, ShardedSource]
    versions: dict[str, str | None]
    secret: str | None
    benchmarks: str


class JobPlaces:
    """Where things of source `name` lie below the folder of a job, which all machines see under one path."""

    def __init__(self, out: Path, name: str) -> None:
        self.out, self.folder = out, out / name
        self.treated, self.shards = self.folder / "treated", self.folder / "shards"
        self.fates, self.hashes = self.folder / "fates.npy", self.folder / "hashes.npy"
        self.decided, self.ledger = self.folder / "decided.json", self.folder / "ledger.json"
        self.rejects = self.folder / "rejects.jsonl"

    def part(self, shard: int) -> Path:
        """Stem of what is kept of a treated shard."""
        return self.treated / f"{shard:05d}"

    def beside(self, shard: int) -> list[Path]:
        """Of a treated shard: the records, the windows of their texts, and how many windows each text has."""
        part = self.part(shard)
        return [part.with_suffix(".jsonl"), part.with_suffix(".windows"), part.with_suffix(".counts.npy")]

    def shard(self, shard: int, num_shards: int) -> Path:
        return self.shards / f"{shard:05d}-of-{num_shards:05d}.jsonl.gz"

    def written(self, shard: int) -> Path:
        """What stands in a finished shard: records and sha256."""
        return self.folder / "written" / f"{shard:05d}.json"


# ---- on the machine that starts the job ------------------------------------------------------------------------------


def plan_job(recipe: Recipe, out: Path, tasks: int) -> ShardJob:
    """Write job.json and benchmarks.json below `out`, or find them as they would be written now.

    Every source of files is cut into at most `tasks` shards of about equal bytes, whole files each; built-in sources
    are left to the run. Raises RecipeError for what cannot be cut, and where `out` belongs to another job.
    """
    sources: dict[str, ShardedSource] = {}
    for name in recipe.used_sources():
        if not recipe.data[name].is_builtin:
            sources[name] = _cut(recipe, name, tasks)
    if not sources:
        raise RecipeError("no source of this recipe is read from files: there is nothing to cut into shards")
    items = [asdict(item) for item in benchmark_items(recipe)]
    redacts = any(phi_mode(recipe, name) == "redact" for name in sources)
    job = ShardJob(
        recipe=recipe,
        sources=sources,
        versions=versions(recipe),
        secret=secret.fingerprint(secret.load()) if redacts else None,
        benchmarks=sha256_json(items),
    )
    with owner_only():
        _check_same(job, out)
        for name in sources:
            places = JobPlaces(out, name)
            for folder in (places.treated, places.shards, places.written(0).parent):
                folder.mkdir(parents=True, exist_ok=True)
        write_checked(out / BENCHMARKS, items)
        write_checked(out / JOB, job.model_dump(mode="json", by_alias=True))
    return job


def _cut(recipe: Recipe, name: str, tasks: int) -> ShardedSource:
    source = recipe.data[name]
    if source.max_records is not None:
        raise RecipeError(
            f"data.{name}.max_records: {source.max_records}: the first records of a corpus are read by one machine\n"
            "leave it out here, and put it into the recipe that reads the shards"
        )
    if source.format == "huggingface":
        raise RecipeError(
            f"data.{name} ({source.path}): the files of a saved dataset are no shards\n"
            "write it as Parquet or JSON lines, or leave it to the run"
        )
    seen: list[FileSeen] = []
    for file in reading_order(source):
        stat = file.stat()
        seen.append(FileSeen(path=str(file.absolute()), size=stat.st_size, mtime_ns=stat.st_mtime_ns))
    return ShardedSource(shards=cut_evenly(seen, tasks), unread=dict(by_extension(list_source(source).unread)))


def cut_evenly(files: Sequence[FileSeen], tasks: int) -> list[list[FileSeen]]:
    """Neighbours in groups of about equal bytes, none empty, at most `tasks`."""
    total, before = sum(file.size for file in files), 0
    groups: dict[int, list[FileSeen]] = {}
    for file in files:
        middle = before + file.size / 2
        groups.setdefault(min(tasks - 1, int(middle * tasks / total)), []).append(file)
        before += file.size
    return list(groups.values())


def _check_same(job: ShardJob, out: Path) -> None:
    """RecipeError where `out` holds something else."""
    before = read_checked(out / JOB)
    if before is None:
        if out.is_dir() and any(out.iterdir()):
            raise RecipeError(f"{out}: a folder that is not empty and holds no job\ngive a new one")
        return
    now = job.model_dump(mode="json", by_alias=True)
    changed = [name for name in now if now[name] != before.get(name)]
    if not changed:
        return
    if "sources" in changed:
        files = _changed_files(now["sources"], before.get("sources", {}))
    else:
        files = ""
    raise RecipeError(
        f"{out}: begun with other {', '.join(changed)}{files}\n"
        "what was made there is kept: give another folder for the new job, or bring back what was there before"
    )


def _changed_files(now: dict[str, dict[str, list]], before: dict[str, dict[str, list]]) -> str:
    """The first file that is new, gone or changed, for a message."""
    differ = _named_files(now).items() ^ _named_files(before).items()
    if not differ:
        return " (cut into another number of shards)"
    return f" (first: {min(path for path, _ in differ)})"


def _named_files(sources: dict[str, dict[str, list]]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for source in sources.values():
        for shard in source["shards"]:
            found.update({file["path"]: (file["size"], file["mtime_ns"]) for file in shard})
    return found


# ---- on every machine ------------------------------------------------------------------------------------------------


def read_job(out: Path) -> ShardJob:
    """The job in `out`, after this machine was checked against it. Raises RunError or RecipeError."""
    node = platform.node()
    found = read_checked(out / JOB)
    if found is None:
        raise RunError(
            f"{node}: {out / JOB} is not there, or damaged\n"
            "all machines must see the job's folder under the same path; start the job with the same command again"
        )
    job = ShardJob.model_validate(found)
    ours, differing = versions(job.recipe), []
    for name in sorted(job.versions.keys() | ours.keys()):
        if job.versions.get(name) != ours.get(name):
            differing.append(f"{name} {ours.get(name)} (the job began with {job.versions.get(name)})")
    if differing:
        raise RunError(
            f"{node}: other versions than the job's: {'; '.join(differing[:4])}\n"
            "install the same on all machines, then give the same command again: finished shards are kept"
        )
    if job.secret is not None:
        _check_secret(job.secret, node)
    return job


def _check_secret(wanted: str, node: str) -> None:
    """RecipeError where the secret of stand-ins is not here; makes none, which would be another one."""
    path = secret.folder() / secret.FILE
    if path.exists() and secret.fingerprint(secret.load()) == wanted:
        return
    raise RecipeError(
        f"{node}: identifiers are replaced with a secret that is not here (fingerprint {wanted})\n"
        f"looked for: {path} ({'another one' if path.exists() else 'not there'})\n"
        "let QMEDTUNE_SECRETS name one folder that all machines see, or bring them the file (mode 600)"
    )


def versions(recipe: Recipe) -> dict[str, str | None]:
    """Whatever two machines must not differ in: `code` is the hash of this package's data code."""
    found: dict[str, str | None] = {"python": ".".join(platform.python_version_tuple()[:2])}
    found["qmedtune"], found["code"] = qmedtune.__version__, _code()
    packages = PACKAGES
    if recipe.hygiene.presidio:
        packages += ("presidio-analyzer", "spacy", recipe.hygiene.presidio)
    return found | installed(packages)


def _code() -> str:
    here = Path(qmedtune.__file__).parent
    digests: list[str] = []
    for path in sorted((here / "data").rglob("*.py")):
        digests.append(f"{path.relative_to(here)} {sha256_file(path)}")
    return sha256_json(digests)[:12]


def read_items(job: ShardJob, out: Path) -> list[BenchmarkItem]:
    """The benchmark items of the job. Raises RunError where they are damaged."""
    rows = read_checked(out / BENCHMARKS)
    if rows is None or sha256_json(rows) != job.benchmarks:
        raise RunError(f"{out / BENCHMARKS}: not there, or damaged\ngive the same command again: it is written anew")
    items: list[BenchmarkItem] = []
    for row in rows:
        items.append(BenchmarkItem(row["task"], row["id"], tuple(row["texts"]), row["pmid"]))
    return items


def check_files(files: Sequence[FileSeen]) -> list[Path]:
    """The files of a shard. Raises DataError where one is not there, or is not what the job was planned with."""
    node = platform.node()
    for file in files:
        path = Path(file.path)
        if not path.is_file():
            raise DataError(
                f"{node}: {path} is not there\n"
                "all machines must see the corpus under the same path: mount it, and give the same command again"
            )
        if path.stat().st_size != file.size:
            raise DataError(
                f"{path}: {path.stat().st_size:,} bytes on {node}, {file.size:,} when the job was planned\n"
                "fetch it again (it may be cut off), and give the same command again"
            )
    return [Path(file.path) for file in files]
