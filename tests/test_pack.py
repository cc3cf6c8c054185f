"""The ledger adds up, nothing is lost, labels are exact, and packed documents do not see each other."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from builders import folders, pack_recipe, packed
from toy_tokenizers import byte_level, save, sentencepiece

from qmedtune import store
from qmedtune.data.hygiene.clean import clean
from qmedtune.data.packing import mix, templates, tokens
from qmedtune.data.packing.pack import IGNORED, PackedRows, StageToPack, pack_stage, pack_validation
from qmedtune.errors import DataError

TOKENIZERS = {"byte_level": byte_level, "sentencepiece": sentencepiece}
WORDS = [
    "the",
    "patient",
    "was",
    "given",
    "aspirin",
    "for",
    "a",
    "headache",
    "and",
    "felt",
    "better",
    "after",
    "two",
    "days",
    "of",
    "rest",
]


def texts(count, seed, longest=120):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


@pytest.fixture(params=TOKENIZERS)
def tokenizer_dir(request, tmp_path):
    return save(TOKENIZERS[request.param](), tmp_path / "tokenizer")


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_token_once_and_in_order(split, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 300 if split else 65, 2000)
    rows = mix.fill_rows(lengths, 64, split)
    assert np.add.reduceat(rows.pieces[:, 2], rows.bounds[:-1]).max() <= 64
    done = np.zeros(len(lengths), np.int64)
    for document, start, length in rows.pieces.tolist():
        assert start == done[document]  # a later piece follows where the earlier one ended
        done[document] += length
    assert (done == lengths).all()
    if not split:
        assert len(rows.pieces) == len(lengths)


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(20, 3000, 5000)
    rows = mix.fill_rows(lengths, 1024, split=True)
    assert lengths.sum() / (1024 * (len(rows.bounds) - 1)) > 0.98


def test_no_piece_is_a_useless_stub():
    rows = mix.fill_rows(np.full(500, 50), 64, split=True)
    assert rows.pieces[:, 2].min() >= 14  # 64 = 50 + 14: cut at a quarter, never one token


# ---- ledger ----------------------------------------------------------------------------------------------------------

CPT = {"cpt": {"mix": {"literature": 15, "notes": 1, "general": 4}, "tokens": 60_000, "seq_len": 128}}


@pytest.fixture
def corpora(tmp_path):
    return folders(tmp_path, literature=texts(400, 1), notes=texts(60, 2), general=texts(2000, 3))


def test_identities_of_the_cpt_ledger(tmp_path, tokenizer_dir, corpora):
    made = pack_recipe([CPT], literature={}, notes={}, general={})
    facts, rows = packed(tmp_path, made, tokenizer_dir, corpora)
    codec = tokens.load_codec(tokenizer_dir)
    for name, entry in facts["mixture"].items():
        records = [json.loads(line)["text"] for line in (corpora[name] / "train.jsonl").read_text().splitlines()]
        assert entry["read"] == sum(len(ids) + 2 for ids in codec.encode(records, markers=False))
        assert entry["read"] == entry["kept"] + entry["dropped"]
        assert entry["dropped"] == 0
        assert entry["kept"] == entry["seen"] + entry["never_sampled"]
    drawn = {name: 0 for name in facts["mixture"]}
    labels = pieces = 0
    for row in range(len(rows)):
        labels += int((rows[row]["labels"] != IGNORED).sum())
        for document, _, length in rows.pieces(row).tolist():
            drawn[rows.source_of(document)] += length
            pieces += 1
    assert drawn == {name: entry["tokens"] for name, entry in facts["mixture"].items()}
    assert sum(drawn.values()) == facts["tokens"]["trained"]
    assert labels == facts["tokens"]["supervised"] == facts["tokens"]["trained"] - pieces
    for key in ("read", "kept", "dropped", "supervised"):
        assert facts["tokens"][key] == sum(entry[key] for entry in facts["mixture"].values())


def test_fertility_is_told_per_source_and_quotes_no_notes(tmp_path, tokenizer_dir, corpora):
    facts, _ = packed(tmp_path, pack_recipe([CPT], literature={}, notes={}, general={}), tokenizer_dir, corpora)
    told = {name: entry["fertility"] for name, entry in facts["mixture"].items()}
    assert all(entry["tokens_per_word"] >= 1 and 0 <= entry["share_of_words_whole"] <= 1 for entry in told.values())
    assert told["literature"]["most_split"] and told["notes"]["most_split"] == []


def test_realised_mixture_is_the_asked_one(tmp_path, tokenizer_dir, corpora):
    made = pack_recipe([CPT], literature={}, notes={}, general={})
    facts, _ = packed(tmp_path, made, tokenizer_dir, corpora)
    for name, share in {"literature": 0.75, "notes": 0.05, "general": 0.2}.items():
        assert facts["mixture"][name]["share"] == pytest.approx(share, abs=0.005)


def test_every_pass_is_whole_before_the_next(tmp_path, tokenizer_dir, corpora):
    made = pack_recipe([CPT], literature={}, notes={}, general={})
    _, rows = packed(tmp_path, made, tokenizer_dir, corpora)
    times = np.zeros(rows.num_documents, np.int64)
    lengths = np.zeros(rows.num_documents, np.int64)
    for row in range(len(rows)):
        for document, _, length in rows.pieces(row).tolist():
            lengths[document] += length
    whole = rows.document_lengths()
    times = lengths / whole
    for name in rows.sources:
        mine = [t for d, t in enumerate(times) if rows.source_of(d) == name]
        assert all(t == int(t) for t in mine)
        assert max(mine) - min(mine) <= 1


def test_order_hangs_on_the_seed_alone(tmp_path, tokenizer_dir, corpora):
    one, two, other = (
        packed(tmp_path, pack_recipe([CPT], seed=s, literature={}, notes={}, general={}), tokenizer_dir, corpora)[1]
        for s in (1, 1, 2)
    )
    same = [np.array_equal(one[i]["input_ids"], two[i]["input_ids"]) for i in range(len(one))]
    assert all(same)
    assert not np.array_equal(one[0]["input_ids"], other[0]["input_ids"])


def test_sources_are_spread_over_the_whole_stage(tmp_path, tokenizer_dir, corpora):
    made = pack_recipe([CPT], literature={}, notes={}, general={})
    _, rows = packed(tmp_path, made, tokenizer_dir, corpora)
    quarter = len(rows) // 4
    for part in range(4):
        counts = dict.fromkeys(rows.sources, 0)
        for row in range(part * quarter, (part + 1) * quarter):
            for document, _, length in rows.pieces(row).tolist():
                counts[rows.source_of(document)] += length
        assert counts["general"] / sum(counts.values()) == pytest.approx(0.2, abs=0.05)


def test_caps_and_documents_as_unit(tmp_path, tokenizer_dir, corpora):
    section = {**CPT["cpt"], "tokens": 150_000, "max_repeats": 1}
    facts, _ = packed(
        tmp_path, pack_recipe([{"cpt": section}], literature={}, notes={}, general={}), tokenizer_dir, corpora
    )
    assert "literature" in facts["capped"]
    assert facts["mixture"]["literature"]["repeats"] == 1
    section = {"mix": {"literature": 1, "general": 1}, "unit": "documents", "tokens": 90_000, "seq_len": 128}
    facts, _ = packed(tmp_path, pack_recipe([{"cpt": section}], literature={}, general={}), tokenizer_dir, corpora)
    draws = [entry["draws"] for entry in facts["mixture"].values()]
    assert draws[0] == pytest.approx(draws[1], rel=0.1)


def test_auto_budget_is_one_pass_of_the_main_source(tmp_path, tokenizer_dir, corpora):
    section = {"mix": {"literature": 15, "notes": 1}, "tokens": "auto", "seq_len": 128}
    facts, _ = packed(tmp_path, pack_recipe([{"cpt": section}], literature={}, notes={}), tokenizer_dir, corpora)
    assert facts["mixture"]["literature"]["repeats"] == 1


@pytest.mark.parametrize("chunking", ["truncate", "window"])
def test_other_chunkings_account_for_what_they_leave(tmp_path, tokenizer_dir, corpora, chunking):
    section = {"mix": {"literature": 1}, "epochs": 2, "seq_len": 64}
    made = pack_recipe([{"cpt": section}], literature={"chunking": chunking})
    facts, rows = packed(tmp_path, made, tokenizer_dir, corpora)
    entry = facts["mixture"]["literature"]
    assert entry["read"] == entry["kept"] + entry["dropped"]
    assert (entry["dropped"] > 0) == (chunking == "truncate")
    assert rows.lengths().sum() == facts["tokens"]["trained"]


@pytest.mark.parametrize("budget", [{"epochs": 3}, {"tokens": 6000}])
def test_a_budget_counts_windows_not_the_documents_they_are_cut_from(tmp_path, tokenizer_dir, budget):
    """PMC-LLaMA's reading: each epoch takes one random window of each paper, each time another."""
    inputs = folders(tmp_path, literature=[" ".join(random.Random(i).choices(WORDS, k=400)) for i in range(40)])
    made = pack_recipe(
        [{"cpt": {"mix": {"literature": 1}, "seq_len": 64, **budget}}], literature={"chunking": "window"}
    )
    facts, rows = packed(tmp_path, made, tokenizer_dir, inputs)
    asked = budget.get("tokens", 3 * 40 * 64)
    assert abs(facts["tokens"]["trained"] - asked) <= 64
    assert facts["mixture"]["literature"]["repeats"] == pytest.approx(asked / (40 * 64), abs=0.03)
    starts = [tuple(rows.pieces(row)[0, :2]) for row in range(len(rows))]
    assert len(set(starts)) > 0.95 * len(starts) and max(start for _, start in starts) > 200


def test_a_cap_takes_whole_documents_and_the_same_ones_each_time(tmp_path, tokenizer_dir, corpora):
    section = {"cpt": {"mix": {"literature": 1, "notes": 1}, "epochs": 2, "seq_len": 64}}
    made = pack_recipe([section], literature={"max_tokens": 900}, notes={})
    facts, rows = packed(tmp_path, made, tokenizer_dir, corpora)
    entry = facts["mixture"]["literature"]
    once = entry["kept"] - entry["beyond_cap"]
    assert 500 < once <= 900 and facts["mixture"]["notes"]["beyond_cap"] == 0
    assert entry["read"] == entry["kept"] + entry["dropped"] and entry["kept"] == entry["seen"] + entry["never_sampled"]
    assert entry["tokens"] > once and entry["seen"] == once  # repeated, but never beyond the chosen documents
    again = pack_recipe([section], literature={"max_tokens": 900}, notes={})
    (tmp_path / "again").mkdir()
    assert pack_stage(StageToPack(again, 0, tokenizer_dir, corpora), tmp_path / "again").as_json() == facts


def test_a_cap_holds_for_instructions_and_is_never_empty(tmp_path, tokenizer_dir):
    inputs = folders(tmp_path, chats=chats(50, 1))
    for cap in (400, 1):
        made = pack_recipe([{"sft": {"data": "chats", "epochs": 2, "seq_len": 2048}}], chats={"max_tokens": cap})
        out = tmp_path / str(cap)
        out.mkdir()
        facts = pack_stage(StageToPack(made, 0, tokenizer_dir, inputs), out).as_json()
        once = facts["tokens"]["trained"] / 2
        assert once <= 400 if cap == 400 else facts["documents_drawn"] == 2


def test_an_empty_source_is_named(tmp_path, tokenizer_dir):
    inputs = folders(tmp_path, literature=[])
    made = pack_recipe([{"cpt": {"mix": {"literature": 1}, "tokens": 100, "seq_len": 64}}], literature={})
    with pytest.raises(DataError, match="literature has no training text left"):
        packed(tmp_path, made, tokenizer_dir, inputs)


def test_a_killed_tokenisation_goes_on_at_its_shard(tmp_path, tokenizer_dir, corpora, monkeypatch):
    monkeypatch.setattr(tokens, "SHARD_BYTES", 20_000)
    made = pack_recipe([CPT], literature={}, notes={}, general={})
    whole, _ = packed(tmp_path, made, tokenizer_dir, corpora)
    out = tmp_path / "interrupted"
    out.mkdir()
    calls, encode = [], tokens.encode_texts

    def dies(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*args, **options)

    monkeypatch.setattr("qmedtune.data.packing.pack.encode_texts", dies)
    with pytest.raises(KeyboardInterrupt):
        pack_stage(StageToPack(made, 0, tokenizer_dir, corpora), out)
    done = len(list((out / "tokens").glob("*.documents.npy")))
    assert done == 3
    again = pack_stage(StageToPack(made, 0, tokenizer_dir, corpora), out).as_json()
    assert again == whole
    total = len(list((out / "tokens").glob("*.documents.npy")))
    assert len(calls) == 4 + total - done  # the three finished shards are not made again


# ---- labels ----------------------------------------------------------------------------------------------------------

SFT = {"sft": {"data": "chats", "epochs": 1, "seq_len": 2048}}


def chats(count, seed):
    rng = random.Random(seed)

    def said(role):
        return {"role": role, "content": " ".join(rng.choices([*WORDS, "é", "</s>", "5 mg", "{x}", "\n"], k=9)).strip()}

    return [{"messages": [said(r) for r in ["user", "assistant"] * rng.randint(1, 4)]} for _ in range(count)]


@pytest.mark.parametrize("name", ["alpaca", "chatml", "human_assistant"])
def test_mask_is_response_and_end_token_of_every_turn(tmp_path, tokenizer_dir, name):
    """1,000 chats over three templates and two tokenizers: decoded supervised spans are the responses, exactly."""
    template, codec = templates.load(name), tokens.load_codec(tokenizer_dir)
    made = chats(167, len(name))
    inputs = folders(tmp_path, chats=made)
    facts, rows = packed(tmp_path, pack_recipe([SFT], chats={"template": name}), tokenizer_dir, inputs)
    assert facts["template"] == name
    found = {}
    for row in range(len(rows)):
        item, at = rows[row], 0
        for document, _, length in rows.pieces(row).tolist():
            ids, labels = (item[key][at : at + length].tolist() for key in ("input_ids", "labels"))
            assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
            spans = [[]]
            for token, label in zip(ids, labels, strict=True):
                spans[-1].append(token) if label != IGNORED else spans.append([])
            found[document] = [span for span in spans if span]
            at += length
    for document, chat in enumerate(made):
        answers = [
            codec.defuse(clean(m["content"], "instructions")) for m in chat["messages"] if m["role"] == "assistant"
        ]
        last = len(answers) - 1
        for turn, (span, answer) in enumerate(zip(found[document], answers, strict=True)):
            if template.eos == "turn" or turn == last:
                assert span[-1] == codec.eos_id
                span = span[:-1]
            assert codec.eos_id not in span
            assert codec.backend.decode(span, skip_special_tokens=False).lstrip() == answer + template.end


def test_training_sees_the_tokens_of_the_generation_prompt(tmp_path, tokenizer_dir):
    codec = tokens.load_codec(tokenizer_dir)
    chat = chats(1, 5)[0]["messages"][:2]
    inputs = folders(tmp_path, chats=[{"messages": chat}])
    _, rows = packed(tmp_path, pack_recipe([SFT], chats={"template": "alpaca"}), tokenizer_dir, inputs)
    prompt = templates.load("alpaca").prompt([{"role": "user", "content": codec.defuse(chat[0]["content"])}])
    expected = [codec.bos_id, *codec.encode([prompt], markers=True)[0]]
    item = rows[0]
    assert item["input_ids"][: len(expected)].tolist() == expected
    assert item["labels"][len(expected) - 1] == IGNORED != item["labels"][len(expected)]


def test_spelled_special_tokens_stay_text(tmp_path, tokenizer_dir):
    codec = tokens.load_codec(tokenizer_dir)
    (document,) = tokens.encode_texts(codec, [{"text": "before </s> after <s>"}], None)
    assert document.ids.count(codec.eos_id) == 1
    assert document.ids.count(codec.bos_id) == 1


def test_loss_on_all_and_weighted_prompts(tmp_path, tokenizer_dir):
    inputs = folders(tmp_path, chats=chats(20, 1))
    section = {**SFT["sft"], "loss_on": "all"}
    facts, rows = packed(tmp_path, pack_recipe([{"sft": section}], chats={"template": "alpaca"}), tokenizer_dir, inputs)
    assert facts["tokens"]["supervised"] == facts["tokens"]["trained"] - facts["pieces"]
    section = {**SFT["sft"], "loss_on": 0.1}
    _, rows = packed(tmp_path, pack_recipe([{"sft": section}], chats={"template": "alpaca"}), tokenizer_dir, inputs)
    assert set(np.unique(rows[0]["weights"])) == {np.float32(0), np.float32(0.1), np.float32(1)}
    section = {**SFT["sft"], "loss_on": 0.001}
    _, rows = packed(tmp_path, pack_recipe([{"sft": section}], chats={"template": "alpaca"}), tokenizer_dir, inputs)
    assert set(np.unique(rows[0]["weights"])) == {np.float32(0), np.float32(0.001), np.float32(1)}


def test_truncation_is_counted_and_lost_responses_are_dropped(tmp_path, tokenizer_dir):
    long_question = {"role": "user", "content": " ".join(WORDS * 20)}
    answer = {"role": "assistant", "content": "yes"}
    long_answer = {"role": "assistant", "content": " ".join(WORDS * 20)}
    question = {"role": "user", "content": "why?"}
    records = [{"messages": m} for m in ([long_question, answer], [question, long_answer], [question, answer])]
    inputs = folders(tmp_path, chats=records)
    section = {"data": "chats", "epochs": 1, "seq_len": 128, "max_truncated_fraction": 1.0}
    made = pack_recipe([{"sft": section}], chats={"template": "question_answer"})
    facts, rows = packed(tmp_path, made, tokenizer_dir, inputs)
    assert facts["records"] == {"read": 3, "truncated": 2, "dropped": 1}
    assert facts["tokens"]["read"] == facts["tokens"]["kept"] + facts["tokens"]["dropped"]
    assert rows.lengths().sum() == facts["tokens"]["trained"] == facts["tokens"]["kept"]
    with pytest.raises(DataError, match="2 of 3 records exceed seq_len 128"):
        strict = {**section, "max_truncated_fraction": 0.05}
        packed(tmp_path, pack_recipe([{"sft": strict}], chats={"template": "question_answer"}), tokenizer_dir, inputs)


def test_epochs_of_sft_are_whole(tmp_path, tokenizer_dir):
    inputs = folders(tmp_path, chats=chats(50, 1))
    section = {**SFT["sft"], "epochs": 2.5}
    facts, _ = packed(tmp_path, pack_recipe([{"sft": section}], chats={"template": "alpaca"}), tokenizer_dir, inputs)
    assert facts["documents_drawn"] == 125


@pytest.mark.parametrize("shard_bytes", [32 << 20, 300])
def test_validation_is_packed_once_up_to_its_limit(tmp_path, tokenizer_dir, corpora, monkeypatch, shard_bytes):
    monkeypatch.setattr(tokens, "SHARD_BYTES", shard_bytes)
    made = pack_recipe([CPT], literature={}, notes={}, general={})
    sections = {"validation": made.validation.model_copy(update={"on": ["notes", "general"], "max_tokens": 500})}
    out = tmp_path / "validation"
    facts = pack_validation(made.model_copy(update=sections), tokenizer_dir, corpora, out).as_json()
    assert set(facts) == {"notes", "general"}
    for name in facts:
        rows = PackedRows(out / name)
        assert 500 <= rows.lengths().sum() < 500 + 400
        assert facts[name]["tokens"]["trained"] == rows.lengths().sum()


# ---- isolation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["train", "checkpointed", "eval"])
def test_packed_documents_do_not_see_each_other(attention, mode):
    """fp32: another first document changes nothing in the second, and packed equals alone within 1e-5."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = SimpleNamespace(vocab=100, first=13, second=17)
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().train(mode != "eval")
    if mode == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first, other, second = (torch.randint(3, shape.vocab, (1, n)) for n in (shape.first, shape.first, shape.second))
    positions = torch.cat([torch.arange(shape.first), torch.arange(shape.second)])[None]

    def logits(head):
        out = model(input_ids=torch.cat([head, second], 1), position_ids=positions, use_cache=False).logits
        return out[:, shape.first :]

    alone = model(input_ids=second, use_cache=False).logits
    assert torch.equal(logits(first), logits(other))
    assert (logits(first) - alone).abs().max() <= 1e-5


# ---- overlap and buckets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.125, 0.5])
def test_overlapping_chunks_hold_every_token_and_share_the_stated_part(tmp_path, tokenizer_dir, overlap):
    inputs = folders(tmp_path, literature=texts(40, 5, longest=400))
    section = {"mix": {"literature": 1}, "epochs": 1, "seq_len": 64}
    made = pack_recipe([{"cpt": section}], literature={"chunking": "overlap", "overlap": overlap})
    facts, rows = packed(tmp_path, made, tokenizer_dir, inputs)
    entry, shared = facts["mixture"]["literature"], int(64 * overlap)
    assert entry["overlapped"] > 0 and entry["tokens"] == entry["kept"] + entry["overlapped"]
    assert entry["repeats"] == 1 and rows.lengths().sum() == facts["tokens"]["trained"]
    pieces = np.concatenate([rows.pieces(row) for row in range(len(rows))])
    times_seen = [np.zeros(length, int) for length in rows.document_lengths()]
    for document, start, length in pieces.tolist():
        times_seen[document][start : start + length] += 1
    for seen in times_seen:
        chunks = 1 if len(seen) <= 64 else -(-(len(seen) - shared) // (64 - shared))
        assert seen.min() == 1 and seen.max() <= 2 and seen.sum() == len(seen) + shared * (chunks - 1)


def test_without_packing_each_row_is_a_record_and_batches_hold_like_lengths(tmp_path, tokenizer_dir):
    inputs = folders(tmp_path, chats=chats(210, 8))
    sft = {"data": "chats", "epochs": 2, "seq_len": 2048, "batch": 4, "min_steps": 1}
    data = {"chats": {"template": "chatml"}}
    plain, packed_rows = packed(tmp_path, pack_recipe([{"sft": sft}], **data), tokenizer_dir, inputs)
    facts, rows = packed(tmp_path, pack_recipe([{"sft": {**sft, "packing": False}}], **data), tokenizer_dir, inputs)
    assert facts["tokens"] == plain["tokens"] and len(packed_rows) < len(rows) == facts["documents_drawn"] == 420
    assert all(len(rows.pieces(row)) == 1 for row in range(len(rows)))
    lengths = rows.lengths()[:420].reshape(-1, 4)
    spread = (lengths.max(axis=1) - lengths.min(axis=1)).mean()
    assert spread < 0.2 * (lengths.max() - lengths.min())
    assert not np.array_equal(np.sort(lengths.mean(axis=1)), lengths.mean(axis=1))  # the batches are shuffled


def test_a_changed_record_costs_the_shard_that_holds_it(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(tokens, "SHARD_BYTES", 4_000)
    many = texts(300, 9)
    changed = [*many[:100], "another one", *many[101:], "and one more"]
    made = pack_recipe([{"cpt": {"mix": {"literature": 1}, "epochs": 1, "seq_len": 64}}], literature={})
    run, encoded, encode = tmp_path / "run", [], tokens.encode_texts
    out = run / "data" / "01-cpt"

    def counted(codec, records, limit):
        encoded.append(len(records))
        return encode(codec, records, limit)

    monkeypatch.setattr("qmedtune.data.packing.pack.encode_texts", counted)
    for number, rows in enumerate([many, changed]):
        encoded.clear()
        building = store.begin(out, run, f"key {number}", {}, keep_partial=True)
        inputs = folders(tmp_path / f"inputs-{number}", literature=rows)
        facts = pack_stage(StageToPack(made, 0, tokenizer_dir, inputs), building).as_json()
        store.publish(building, out, run, f"key {number}", facts)
    assert facts["mixture"]["literature"]["documents"] == 301
    assert 2 <= sum(encoded) < 100
