"""Results of the data steps: the ledger of each source, and of what was packed for each stage."""

from __future__ import annotations

from pydantic import Field

from qmedtune.results.typed import Facts, Number


class Records(Facts):
    """read = kept + rejected + duplicates + contaminated + refused."""

    read: int | None = None
    kept: int | None = None
    rejected: int | None = None
    duplicates: int | None = None
    contaminated: int | None = None
    refused: int | None = None


class Cleaned(Facts):
    """What cleaning changed."""

    records: int = 0
    characters: int = 0


class Identifiers(Facts):
    """Direct identifiers of a clinical source by class; shapes, never texts. Empty where nothing was looked for."""

    mode: str | None = None
    records: int = 0
    identifiers: int = 0
    classes: dict[str, int] = {}
    shapes: dict[str, list[str]] = {}
    note: str = ""


class Overlap(Facts):
    """Benchmark items that a source holds. found: ids; by_pmid: hits by the article's number alone; given_back: items
    too general to be evidence."""

    items: int = 0
    found: list[str] = []
    records: int = 0
    by_pmid: int = 0
    given_back: int = 0


class NearDuplicates(Facts):
    """Near duplicates of records of earlier sources, and some pairs of ids as examples."""

    of_earlier_sources: int = 0
    examples: list[list[str]] = []


class Source(Facts):
    """The ledger of one source, after reading, hygiene and the split."""

    records: Records = Records()
    near_duplicates: int = 0
    held_out: int | None = None
    sha256: str | None = None
    kind: str | None = None
    license: str | None = None
    terms: str | None = None
    files: int | None = None
    reasons: dict[str, int] = {}
    recognised: dict[str, int] = {}
    columns_read: dict[str, int] = {}
    columns_unread: dict[str, int] = {}
    files_unread: dict[str, int] = {}
    cleaned: Cleaned = Cleaned()
    phi: Identifiers = Identifiers()
    warnings: list[str] = []
    contamination: dict[str, Overlap] = {}
    near: NearDuplicates = NearDuplicates()
    seconds: Number | None = None
    host_peak_bytes: int | None = None


class TokenLedger(Facts):
    """Ledger of a packed stage. kept = read - dropped; trained: repeats included; supervised: those with a loss; split:
    those that continue, in another row, a document begun before."""

    read: int | None = None
    kept: int | None = None
    split: int | None = None
    dropped: int | None = None
    supervised: int | None = None
    trained: int | None = None


class Fertility(Facts):
    """What the tokenizer makes of a source's words, on a sample."""

    words: int
    tokens: int
    tokens_per_word: Number
    characters_per_token: Number
    share_of_words_whole: Number
    share_unknown: Number
    most_split: list[list[str | int]] = []


class Part(Facts):
    """One source within a mixture. share: realised, of the tokens trained; repeats: passes over the source."""

    share: Number
    asked_share: Number | None = None
    tokens: int
    repeats: Number | None = None
    read: int | None = None
    kept: int | None = None
    dropped: int | None = None
    seen: int | None = None
    never_sampled: int | None = None
    supervised: int | None = None
    documents: int | None = None
    truncated_documents: int | None = None
    dropped_documents: int | None = None
    draws: int | None = None
    beyond_cap: int | None = None
    overlapped: int | None = None
    fertility: Fertility | None = None


class PackedRecords(Facts):
    """Documents that were read, cut, and left without a token."""

    read: int
    truncated: int
    dropped: int


class Classes(Facts):
    """Labels of a classify stage; unknown: held-out documents none of whose labels training saw; validation: documents
    that chose the weights, neither trained on nor scored."""

    labels: int
    documents: int
    held_out: int
    unknown: int
    validation: int | None = None


class Packing(Facts):
    """A packed stage: what a `data/NN-kind` step finds."""

    records: PackedRecords | None = None
    tokens: TokenLedger = TokenLedger()
    mixture: dict[str, Part] = {}
    rows: int = 0
    seq_len: int | None = None
    documents_drawn: int | None = None
    row_fill: Number | None = None
    pieces: int | None = None
    leftover: dict[str, int] = {}
    capped: list[str] = []
    template: str | None = None
    borders: dict[str, str | None] | None = None
    classes: Classes | None = None


class HeldOut(Facts):
    """The packed held-out text, by source: what the step `data/validation` finds."""

    __pydantic_extra__: dict[str, Packing] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def sources(self) -> dict[str, Packing]:
        return self.__pydantic_extra__


class Planted(Facts):
    """Canaries that were inserted into training data.

    canaries: how many; documents: by source, the records that hold them.
    """

    canaries: int
    documents: dict[str, int]
