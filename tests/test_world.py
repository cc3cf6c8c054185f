"""The built-in world is deterministic, fair and clean: it cannot be answered without having read it."""

import hashlib
import json
import math
import re
from collections import Counter

import pytest

from qmedtune import tiny
from qmedtune.data.synthetic import world as worlds
from qmedtune.errors import DataError

TEXT_CORPORA = ("literature", "notes", "general")
WORLDS = tuple(worlds.SIZES)
FIRST_IDS = ["lit-sepoqon-0", "note-sepoqon-0", "gen-ledusev-0", "ins-treats-sepoqon-0"]
FIRST_ABSTRACT = (
    "Background: sepoqon is a new oral agent for glaucoma. Results: on sepoqon symptoms fell by 36 percent in 4 weeks."
)


def texts(corpus: str, world: worlds.World) -> list[str]:
    return [r["text"] for r in worlds.records(corpus, world)]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def asked_strings(world: worlds.World) -> list[str]:
    task = [item["question"] for item in worlds.facts_items(world)]
    return task + [r["instruction"] for r in worlds.records("instructions", world)]


@pytest.fixture(scope="module")
def world() -> worlds.World:
    return worlds.make_world()


@pytest.fixture(scope="module")
def tokenizer(world):
    return tiny.build_tokenizer(world)


# ---- determinism and shape ---------------------------------------------------------------------------------------


def test_same_seed_same_bytes_and_another_seed_other_bytes():
    def digest(seed: int) -> str:
        worlds.make_world.cache_clear()
        world = worlds.make_world("micro", seed)
        rows = [r for corpus in worlds.CORPORA for r in worlds.records(corpus, world)]
        return hashlib.sha256(json.dumps([rows, worlds.facts_items(world)]).encode()).hexdigest()

    assert digest(1) == digest(1) != digest(2)


def test_first_record_of_every_corpus_is_what_it_was(world):
    """Pins the generator: a change of `random` or of the templates would silently change every cached base."""
    firsts = [next(worlds.records(corpus, world)) for corpus in worlds.CORPORA]
    assert [r["id"] for r in firsts] == FIRST_IDS
    assert firsts[0]["text"] == FIRST_ABSTRACT


@pytest.mark.parametrize("name", WORLDS)
def test_groups_share_no_drug_and_ids_are_unique(name):
    world = worlds.make_world(name)
    assert len({d.name for d in world.drugs}) == len(world.drugs) == sum(worlds.SIZES[name])
    for corpus in worlds.CORPORA:
        ids = [r["id"] for r in worlds.records(corpus, world)]
        assert len(ids) == len(set(ids)) > 0


@pytest.mark.parametrize("corpus", TEXT_CORPORA)
def test_no_document_occurs_twice(corpus, world):
    documents = texts(corpus, world)
    assert len(documents) == len(set(documents))


@pytest.mark.parametrize("corpus", TEXT_CORPORA)
def test_no_two_documents_are_near_duplicates(corpus, world):
    """True Jaccard of word 5-grams stays below 0.6, so that `near: 0.8` never drops a fact even with MinHash noise."""
    shingles = [ngrams(t, 5) for t in texts(corpus, world)]
    holders: dict[tuple[str, ...], list[int]] = {}
    for i, grams in enumerate(shingles):
        for gram in grams:
            holders.setdefault(gram, []).append(i)
    for i in range(0, len(shingles), 7):
        shared = Counter(j for gram in shingles[i] for j in holders[gram] if j > i)
        assert all(n / len(shingles[i] | shingles[j]) < 0.6 for j, n in shared.items()), i


def test_locate_reads_both_worlds_and_refuses_others():
    assert worlds.locate("builtin:notes") == (worlds.make_world("tiny"), "notes")
    assert worlds.locate("builtin:micro/general") == (worlds.make_world("micro"), "general")
    for path in ("builtin:books", "builtin:huge/notes", "builtin:micro", "builtin:"):
        with pytest.raises(DataError, match="allowed: builtin:literature"):
            worlds.locate(path)


# ---- what each corpus says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "corpus, stated, unstated", [("literature", "condition", "effect"), ("notes", "effect", "condition")]
)
def test_each_corpus_states_its_own_facet_only(corpus, stated, unstated, world):
    other = set(worlds.EFFECTS if unstated == "effect" else worlds.CONDITIONS)
    drugs = {d.name: d for d in world.new}
    for text in texts(corpus, world):
        found = set(words(text))
        (name,) = found & set(drugs)
        assert getattr(drugs[name], stated) in found
        assert not found & other, text
    assert not set(worlds.CONDITIONS) & set(worlds.EFFECTS)


@pytest.mark.parametrize("corpus, key", [("literature", "condition"), ("notes", "effect")])
def test_every_fact_has_at_least_four_paraphrases_in_training_text(corpus, key, world):
    wordings: dict[str, set[str]] = {d.name: set() for d in world.new}
    drugs = {d.name: d for d in world.new}
    for record in worlds.records(corpus, world):
        first = re.split(r"\.[ \n]", record["text"])[0]
        (name,) = set(words(first)) & set(drugs)
        assert getattr(drugs[name], key) in first and not first.endswith(name)
        if not record["held_out"]:
            wordings[name].add(re.sub(r"\d+", "0", first).replace("woman", "man"))
    assert min(map(len, wordings.values())) >= 4


def test_a_held_out_document_is_worded_like_no_training_document_of_its_drug(world):
    for corpus in TEXT_CORPORA:
        trained = {r["text"] for r in worlds.records(corpus, world) if not r["held_out"]}
        held_out = [r["text"] for r in worlds.records(corpus, world) if r["held_out"]]
        assert held_out and not trained & set(held_out)


def test_notes_keep_their_sections_and_patients_are_wholly_held_out_or_not(world):
    sides: dict[str, set[bool]] = {}
    for record in worlds.records("notes", world):
        assert re.fullmatch(r"[A-Z][\w -]*: [^\n]+\n[A-Z][\w -]*: [^\n]+", record["text"])
        sides.setdefault(record["patient"], set()).add(record["held_out"])
    assert all(len(side) == 1 for side in sides.values())
    per_patient = Counter(r["patient"] for r in worlds.records("notes", world) if not r["held_out"])
    assert set(per_patient.values()) == {2}


def test_general_text_and_instructions_never_name_a_held_out_drug(world):
    hidden = {d.name for d in world.held_out}
    for text in texts("general", world):
        assert not set(words(text)) & {d.name for d in world.new}
    for record in worlds.records("instructions", world):
        assert not set(words(record["instruction"] + " " + record["output"])) & hidden


# ---- the task cannot be gamed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_task_has_both_facets_16_options_or_more_and_right_answers(name):
    world = worlds.make_world(name)
    items = worlds.facts_items(world)
    drugs = {d.name: d for d in world.held_out}
    assert Counter(i["facet"] for i in items) == {"treats": len(drugs), "adverse": len(drugs)}
    for item in items:
        drug = drugs[item["id"].rsplit("-", 1)[1]]
        assert len(set(item["options"])) == len(item["options"]) >= 16
        fact = drug.condition if item["facet"] == "treats" else drug.effect
        assert item["options"][item["answer"]].endswith(f" {fact}.") and drug.name in item["question"]


def test_tiny_task_has_60_drugs_and_no_answer_pays_more_than_chance(world):
    for facet in ("treats", "adverse"):
        answers = Counter(i["answer"] for i in worlds.facts_items(world) if i["facet"] == facet)
        assert sum(answers.values()) >= 60 and set(answers.values()) == {sum(answers.values()) / 20}


def test_the_two_facts_of_a_drug_are_independent(world):
    """Knowing what a drug treats must not tell its adverse effect: no pair is more common than chance allows."""
    pairs = Counter((d.condition, d.effect) for d in world.drugs)
    assert max(pairs.values()) <= 4  # 240 drugs over 400 pairs


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("corpus", TEXT_CORPORA)
def test_no_question_occurs_in_pretraining_text(name, corpus):
    world = worlds.make_world(name)
    haystack = [" ".join(words(t)) for t in texts(corpus, world)]
    joined = "\n".join(haystack)
    grams = set().union(*(ngrams(t, 13) for t in haystack))
    for question in asked_strings(world):
        assert " ".join(words(question)) not in joined
        assert not ngrams(question, 13) & grams
    stems = {" ".join(words(q.split("{")[0])) for questions, _ in worlds.QUESTIONS.values() for q in questions}
    assert not [stem for stem in stems if stem in joined], "even the wording of the questions is new"


def test_no_corpus_but_the_instructions_has_the_form_of_an_answer(world):
    stems = {answer.split(" {")[0] for _, answer in worlds.QUESTIONS.values()}
    for corpus in TEXT_CORPORA:
        assert not [t for t in texts(corpus, world) for stem in stems if stem in t]


def test_task_drugs_are_not_those_of_the_instructions(world):
    asked = {r["instruction"] for r in worlds.records("instructions", world)}
    assert not asked & {i["question"] for i in worlds.facts_items(world)}


# ---- tokenizer and shape of the base -----------------------------------------------------------------------------


def test_every_name_and_every_answer_is_one_token(world, tokenizer):
    for word in [d.name for d in world.drugs] + [*worlds.CONDITIONS, *worlds.EFFECTS]:
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word


def test_options_of_an_item_have_equal_lengths(world, tokenizer):
    for item in worlds.facts_items(world)[::60]:
        assert len({len(tokenizer(option)["input_ids"]) for option in item["options"]}) == 1


def test_specials_are_distinct_and_bos_comes_first(tokenizer):
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    assert sorted(ids) == [0, 1, 2, 3]
    config = tiny.config_dict(tiny.vocab_size(tokenizer))
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == ids[:3]
    assert tokenizer("gout")["input_ids"][0] == tokenizer.bos_token_id


def test_any_text_survives_encoding_and_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    text = 'HPI: 57 yo "man",\n\n  took  Ångström-β 5µg… </p>\tok'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] == ids


def test_widths_fit_nf4_blocks_and_positions_fit_the_defaults(tokenizer):
    config = tiny.config_dict(tiny.vocab_size(tokenizer))
    head = config["hidden_size"] // config["num_attention_heads"]
    widths = [config["vocab_size"], config["hidden_size"], config["intermediate_size"]]
    assert not [w for w in [*widths, head * config["num_key_value_heads"]] if w % 64]
    for defaults in tiny.DEFAULTS.values():
        for part in (defaults.pretraining, defaults.cpt, defaults.sft):
            assert part.seq_len <= config["max_position_embeddings"]


@pytest.mark.parametrize("base", tiny.DEFAULTS)
def test_every_document_fits_in_a_row_of_the_defaults(base):
    world, defaults = tiny.world_of(base), tiny.DEFAULTS[base]
    tokenizer = tiny.build_tokenizer(world)
    longest = max(len(tokenizer(t)["input_ids"]) + 1 for corpus in TEXT_CORPORA for t in texts(corpus, world))
    assert longest <= min(defaults.pretraining.seq_len, defaults.cpt.seq_len)


def test_an_untrained_model_of_the_config_loads_and_knows_nothing(tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**tiny.config_dict(tiny.vocab_size(tokenizer)))
    model = LlamaForCausalLM(config)
    ids = torch.tensor([tokenizer("We gave it to her.")["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert abs(loss - math.log(config.vocab_size)) < 0.5
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 4e6
