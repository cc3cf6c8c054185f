"""Tables, instructions and benchmarks as they are published: headers, parts of a row, shapes of the Hub, refusals."""

import json

import pytest

from qmedtune.data.hygiene.benchmarks import benchmark_items
from qmedtune.data.prepare import prepare_source
from qmedtune.data.reading.rejects import Damaged, RefusedRecord, Unread
from qmedtune.data.reading.sources import read_items
from qmedtune.errors import DataError
from qmedtune.recipe import Recipe, SourceSection, TaskSection
from qmedtune.tasks import load_task


def read(path, data, kind="clinical", **section):
    """(records, what stands for the others, tally) of one file."""
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    items = read_items(SourceSection(path=str(path), kind=kind, **section))
    found = [item for _, _, item in items]
    others = [item for item in found if isinstance(item, Damaged | RefusedRecord)]
    return [item for item in found if isinstance(item, dict)], others, items.tally.as_dict()


# ---- tables ----------------------------------------------------------------------------------------------------------

NOTES = "Fieber, 38°C; Husten"
ROWS = f'id;text\n1;"{NOTES}"\n2;besser\n'
WRITTEN = {
    "semicolons": (ROWS.encode(), "separator ;, utf-8, line ends LF"),
    "windows": (ROWS.replace("\n", "\r\n").encode("cp1252"), "separator ;, cp1252, line ends LF"),
    "utf-16": (ROWS.encode("utf-16"), "separator ;, utf-16, line ends LF"),
    "utf-16 without mark": (ROWS.encode("utf-16-le"), "separator ;, utf-16-le, line ends LF"),
    "old mac": (ROWS.replace("\n", "\r").encode(), "separator ;, utf-8, line ends CR"),
    "sep line": (("sep=;\n" + ROWS).encode(), "separator ;, utf-8, line ends LF"),
    "bars": (ROWS.replace(";", "|", 2).replace("2;", "2|").encode(), "separator |, utf-8, line ends LF"),
    "tabs": (ROWS.replace(";", "\t", 2).replace("2;", "2\t").encode(), "separator tab, utf-8, line ends LF"),
    "byte order mark": (("\ufeff" + ROWS).encode(), "separator ;, utf-8, line ends LF"),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_tables_as_excel_writes_them(tmp_path, how):
    data, said = WRITTEN[how]
    data = data if how != "bars" else f'id|text\n1|"{NOTES}"\n2|besser\n'.encode()
    records, others, tally = read(tmp_path / "a.csv", data)
    assert [(r["id"], r["text"]) for r in records] == [("1", NOTES), ("2", "besser")] and not others
    assert tally["recognised"] == {f"csv ({said})": 1}


def test_quotes_inside_cells_of_a_tab_separated_file_are_text(tmp_path):
    data = 'id\ttext\n1\t"Quoted" at the start\n2\tsaid "no"\n3\t5\'9" tall\n'
    records, others, _ = read(tmp_path / "a.tsv", data)
    assert [r["text"] for r in records] == ['"Quoted" at the start', 'said "no"', "5'9\" tall"] and not others


def test_what_the_recipe_says_is_taken(tmp_path):
    data = "id#text\n1#gr\u00fcn\n".encode("mac-roman")
    (record,), _, _ = read(tmp_path / "a.csv", data, delimiter="#", encoding="mac-roman")
    assert record["text"] == "gr\u00fcn"


SECRET = "Quill"
FAULTS = {
    "twice": ("text,text,id\na,b,1\n", "names a column twice (text)"),
    "no header": (f"7,{SECRET} is well\n8,{SECRET} is ill\n", "no known name among its 2 columns"),
    "data for a header": (f"note,{SECRET}\nnote,Smith\n", "stands in its own column again"),
    "open quote": ('"id,text\n1,a\n', "the header cannot be read"),
    "blank before the comma": ('"id" ,"text"\n"1","a"\n', "the header cannot be read"),
    "another number of columns": ("id,text,note\n1,a\n2,b\n", "the header has 3 columns and the rows have 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_header_that_is_none_makes_the_file_unread(tmp_path, fault):
    data, said = FAULTS[fault]
    records, others, tally = read(tmp_path / "a.csv", data)
    assert not records and isinstance(others[0], Unread) and said in others[0].reason
    assert "separator" in others[0].reason and "line ends" in others[0].reason
    assert SECRET not in str(others) + str(tally)


def test_cells_of_a_first_row_are_never_printed(tmp_path):
    """A headerless table in which a cell happens to be the name of a column."""
    made = {
        "name": "t", "model": {"base": "builtin:tiny"}, "stages": [{"cpt": {"mix": {"a": 1}}}],
        "data": {"a": {"path": str(tmp_path / "a.csv"), "kind": "clinical"}}, "hygiene": {"max_bad_fraction": 1.0},
    }  # fmt: skip
    (tmp_path / "a.csv").write_text(f"{SECRET},text,1931-02-03\nSmith,He is well,1950-01-01\n")
    (tmp_path / "out").mkdir()
    facts = prepare_source(Recipe.model_validate(made), "a", {}, tmp_path / "out").as_json()
    assert facts["columns_unread"] == {"(no known name)": 2} and SECRET not in json.dumps(facts)


def test_a_wrong_column_is_said_from_the_header(tmp_path):
    data = "id,note_text\n" + "1,x\n" * 9
    with pytest.raises(
        DataError, match=r"no column 'notetext'.*\ndid you mean note_text\? columns there: id, note_text"
    ):
        read(tmp_path / "a.csv", data, columns={"text": "notetext"})


def test_an_empty_result_says_why(tmp_path):
    made = {
        "name": "t", "model": {"base": "builtin:tiny"}, "stages": [{"sft": {"data": "a"}}],
        "data": {"a": {"path": str(tmp_path / "a.json"), "kind": "instructions"}},
    }  # fmt: skip
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "label": False}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"no record is left.*\n.*\nmost frequent: marked as a bad answer"):
        prepare_source(Recipe.model_validate(made), "a", {}, tmp_path / "out")


# ---- instructions ----------------------------------------------------------------------------------------------------

CHAT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
WHOLE = {
    "history": (
        {"instruction": "Third?", "input": "", "output": "c", "history": [["First?", "a"], ["Second?", "b"]]},
        [("user", "First?"), ("assistant", "a"), ("user", "Second?"), ("assistant", "b"), ("user", "Third?"),
         ("assistant", "c")],
    ),
    "system": ({"conversations": CHAT, "system": "Be brief."},
               [("system", "Be brief."), ("user", "Q"), ("assistant", "A")]),
    "dolly": ({"instruction": "Sum up.", "context": "Long.", "response": "S.", "category": "x"},
              [("user", "Sum up.", "Long."), ("assistant", "S.")]),
    "context": ({"question": "Q?", "context": "Long.", "answer": "yes"},
                [("user", "Q?", "Long."), ("assistant", "yes")]),
    "input and context": ({"instruction": "Do.", "input": "This.", "context": "Long.", "output": "D."},
                          [("user", "Do.", "This.\n\nLong."), ("assistant", "D.")]),
    "empty instruction": ({"instruction": "", "input": "I cough", "output": "Rest."},
                          [("user", "I cough"), ("assistant", "Rest.")]),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]},
                            {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]},
              [("user", "Q"), ("assistant", "A")]),
    "lists": ({"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
              [("user", "Q"), ("assistant", "A")]),
    "reasoning": ({"Question": "Q", "Complex_CoT": "think", "Response": "A"}, [("user", "Q"), ("assistant", "A")]),
    "icliniq": ({"input": "I cough", "answer_icliniq": "Rest.", "answer_chatgpt": "x"},
                [("user", "I cough"), ("assistant", "Rest.")]),
    "bioasq": ({"body": "Q?", "type": "yesno", "exact_answer": "yes", "ideal_answer": ["Yes."], "documents": ["u"],
                "snippets": [{"text": "S1."}, {"text": "S2."}]}, [("user", "Q?", "S1.\nS2."), ("assistant", "Yes.")]),
    "squad of the hub": ({"id": "1", "context": "Owls fly.", "question": "What?", "answers": {"text": ["fly"]}},
                         [("user", "What?", "Owls fly."), ("assistant", "fly")]),
    "pubmedqa of the hub": ({"pubid": 4, "question": "Q?", "context": {"contexts": ["a", "b"]}, "final_decision": "no"},
                            [("user", "Abstract: a\nb\nQuestion: Q?\nAnswer yes, no or maybe."), ("assistant", "no")]),
    "mmlu of the hub": ({"question": "Q?", "subject": "s", "choices": ["w", "x"], "answer": 1},
                        [("user", "Q?\nA. w\nB. x"), ("assistant", "B. x")]),
    "medqa by text": ({"question": "Q?", "options": {"A": "w", "B": "x"}, "answer": "x"},
                      [("user", "Q?\nA. w\nB. x"), ("assistant", "B. x")]),
    "an empty option": ({"question": "Q?", "options": {"A": "w", "B": ""}, "answer_idx": "A"},
                        [("user", "Q?\nA. w\nB."), ("assistant", "A. w")]),
    "kto, good": ({"prompt": "Q", "completion": "A", "label": True}, [("user", "Q"), ("assistant", "A")]),
    "ACI-Bench": ({"dialogue": "Doctor: Hi.", "note": "CC: none."},
                  [("user", "Write the clinical note of this visit.", "Doctor: Hi."), ("assistant", "CC: none.")]),
    "MeQSum": ({"CHQ": "Long?", "Summary": "Short?"},
               [("user", "Summarise this question in one sentence.", "Long?"), ("assistant", "Short?")]),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_all_parts_of_a_row_are_read(tmp_path, name):
    row, said = WHOLE[name]
    (record,), others, _ = read(tmp_path / "a.json", json.dumps([row]), "instructions")
    found = [(m["role"], m["content"], *([m["input"]] if "input" in m else [])) for m in record["messages"]]
    assert found == said and not others


def test_keys_that_are_not_read_are_named(tmp_path):
    row = {"instruction": "I", "output": "A", "data_source": "x", "rating": 3, "free words": 1}
    _, _, tally = read(tmp_path / "a.jsonl", json.dumps(row), "instructions")
    assert tally["columns_unread"] == {"data_source": 1, "rating": 1, "free words": 1}
    assert tally["recognised"] == {"jsonl: alpaca": 1}


UNSUPPORTED = {
    "preference": ({"conversations": [*CHAT, CHAT[0]], "chosen": {}, "rejected": {}}, "a preference pair"),
    "preference of texts": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "a preference pair"),
    "images": ({"messages": [], "images": ["a.png"]}, "`images`, which are not supported"),
    "an image part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a message holds a part that is no text",
    ),
    "finished text": ({"text": "[INST] Q [/INST] A"}, "a finished text"),
    "two systems": ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "Q"}], "system": "b"},
                    "two system messages"),
    "bad answer": ({"instruction": "I", "output": "A", "kto_tag": False}, "marked as a bad answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_kinds_are_refused_by_name(tmp_path, name):
    row, reason = UNSUPPORTED[name]
    records, (other,), _ = read(tmp_path / "a.json", json.dumps([row]), "instructions")
    assert not records and reason in other.reason


def test_consumer_questions_in_xml(tmp_path):
    medquad = (
        '<Document id="7" source="X"><Focus>Owls</Focus><QAPairs><QAPair pid="1"><Question qid="7-1" qtype="info">What '
        'are owls?</Question><Answer>Birds.\n\n   They see.</Answer></QAPair><QAPair pid="2"><Question qid="7-2">Who?'
        "</Question><Answer/></QAPair></QAPairs></Document>"
    )
    (record,), (other,), tally = read(tmp_path / "m.xml", medquad, "instructions")
    assert [m["content"] for m in record["messages"]] == ["What are owls?", "Birds.\nThey see."]
    assert (record["id"], record["group"], other) == ("7-1", "7", RefusedRecord("no answer"))
    assert tally["columns_unread"] == {"focus": 1, "qtype": 1}
    liveqa = (
        '<LiveQA2017-Medical-Test-Set-Full><NLM-QUESTION qid="T1"><Original-Question><Subject>Owls</Subject>'
        "<Message>Do they see?</Message></Original-Question><ReferenceAnswers><RefAnswer><Answer>Yes.</Answer>"
        "</RefAnswer><RefAnswer><Answer>At night.</Answer></RefAnswer></ReferenceAnswers></NLM-QUESTION>"
        "</LiveQA2017-Medical-Test-Set-Full>"
    )
    (record,), _, _ = read(tmp_path / "l.xml", liveqa, "instructions")
    assert [m["content"] for m in record["messages"]] == ["Owls\nDo they see?", "Yes."]


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def load(task, path, **section):
    return load_task(TaskSection(task=task, path=str(path), **section), seed=0)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    files.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


PUBMEDQA = [
    {"pubid": n, "question": f"Do owls {n}?", "context": {"contexts": [f"They {n}."]}, "final_decision": answer}
    for n, answer in ((1, "yes"), (2, "no"))
]
HUB = {
    "pubmedqa": (PUBMEDQA, [0, 1]),
    "medqa": ([{"question": "Q?", "options": {"A": "w", "B": "x"}, "answer": "x"}], [1]),
    "mmlu": ([{"question": "Q?", "subject": "anatomy", "choices": ["w", "x", "y", ""], "answer": 2}], [2]),
    "medmcqa": ([{"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "", "cop": n} for n in (0, 3)], [0, 3]),
    "mednli": ([{"premise": "P", "hypothesis": "H", "label": n} for n in (0, 1, 2)], [0, 2, 1]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("task", HUB)
def test_shapes_of_the_hub(tmp_path, task, suffix):
    rows, gold = HUB[task]
    path = (lines if suffix == "jsonl" else parquet)(tmp_path / f"test.{suffix}", rows)
    assert [item.gold for item in load(task, path).items] == gold


@pytest.mark.parametrize(
    "text", ["question,A,B,C,D,answer\nQ?,w,x,y,z,2\n", "Q?,w,x,y,z,2\n", "Q?,w,x,y,z,C\n", 'Q?,w,"x",,z,C\n']
)
def test_mmlu_with_header_with_indices_and_with_an_empty_option(tmp_path, text):
    (tmp_path / "anatomy_test.csv").write_text(text)
    [item] = load("mmlu", tmp_path / "anatomy_test.csv").items
    assert (item.gold, item.facet, item.messages[0]["content"].splitlines()[0]) == (2, "anatomy", "Q?")


def pubmedqa_folder(tmp_path, count=6, test=(2, 4)):
    rows = {
        str(n): {"QUESTION": f"Do {n} owls?", "CONTEXTS": ["They do."], "final_decision": ["yes", "no"][n % 2]}
        for n in range(count)
    }
    (tmp_path / "ori_pqal.json").write_text(json.dumps(rows))
    (tmp_path / "test_ground_truth.json").write_text(json.dumps({str(n): "yes" for n in test}))
    return tmp_path


def test_the_test_set_of_pubmedqa_is_scored_and_looked_for(tmp_path):
    folder = pubmedqa_folder(tmp_path)
    for path in (folder, folder / "ori_pqal.json"):
        assert [item.id for item in load("pubmedqa", path).items] == ["2", "4"]


def test_all_thousand_questions_of_pubmedqa_give_the_published_five_hundred(tmp_path):
    from qmedtune.tasks.choice import PUBMEDQA_TEST

    published = json.loads(PUBMEDQA_TEST.read_text())
    rows = {
        str(n): {"QUESTION": f"Do {n}?", "CONTEXTS": ["."], "final_decision": "no"}
        for n in [*published, *range(1, 501)]
    }
    (tmp_path / "pqal.json").write_text(json.dumps(rows))
    found = load("pubmedqa", tmp_path / "pqal.json").items
    assert len(rows) == 1000 and [int(item.id) for item in found] == published and len(published) == 500


def ddi(folder, name, pairs):
    folder.mkdir(parents=True, exist_ok=True)
    kinds = "".join(f'<pair id="{name}.p{n}" e1="{name}.e0" e2="{name}.e1" {kind}/>' for n, kind in enumerate(pairs))
    entities = "".join(f'<entity id="{name}.e{n}" charOffset="{n * 10}-{n * 10 + 4}"/>' for n in range(2))
    text = f"owlin and mousin meet in {name}."
    (folder / f"{name}.xml").write_text(
        f'<document id="{name}"><sentence id="{name}.s" text="{text}">{entities}{kinds}</sentence></document>'
    )


def test_ddi_as_its_authors_zip_it(tmp_path):
    root = tmp_path / "DDICorpus"
    ddi(root / "Test/Test for DDI Extraction task/DrugBank", "a", ['ddi="false"', 'ddi="true" type="effect"'])
    ddi(root / "Test/Test for DrugNER task/DrugBank", "b", ['ddi="false"', 'ddi="false"'])
    ddi(root / "Train/DrugBank", "c", ['ddi="true"', 'ddi="true" type="int"', 'ddi="false"'])
    task = load("ddi2013", root, shots=1)
    assert len(task.items) == 2 and {item.id for item in task.items} == {"a/a.p0", "a/a.p1"}
    assert all(shots[0].startswith(("c", "c/c")) for shots in (item.shots for item in task.draws[0]))
    assert [item.id for item in load("ddi2013", root, split="train").items] == ["c.p1", "c.p2"]
    with pytest.raises(DataError, match="same label"):
        ddi(tmp_path / "one", "d", ['ddi="false"'] * 3)
        load("ddi2013", tmp_path / "one")


def test_bionli_as_its_authors_have_it(tmp_path):
    text = (
        ",doc_id,supp_set,conclusion,label_cat,label\n0,1,Owls see.,They see.,pos,pos\n1,1,Owls see.,Blind.,rest,neg\n"
    )
    (tmp_path / "test.csv").write_text(text)
    items = load("bionli", tmp_path / "test.csv").items
    assert [item.options[item.gold] for item in items] == ["entailment", "contradiction"]
    assert items[0].stated == ("Owls see.", "They see.")


def test_sentences_of_blurb_become_the_abstracts_that_are_scored(tmp_path):
    labels = "resisting cell death,inducing angiogenesis"
    rows = f"index\tsentence1\tlabels\n12_s1\tOne.\t{labels}\n12_s2\tTwo.\t\n13_s1\tX.\t\n"
    (tmp_path / "test.tsv").write_text(rows)
    items = load("hoc", tmp_path / "test.tsv").items
    assert [(item.id, item.messages[0]["input"], sorted(item.gold)) for item in items] == [
        ("12", "One. Two.", ["inducing angiogenesis", "resisting cell death"]), ("13", "X.", []),
    ]  # fmt: skip


@pytest.mark.parametrize("task", [*HUB, "summarization", "meqsum", "mts_dialog"])
def test_what_is_scored_is_what_training_text_is_searched_for(tmp_path, task):
    """Whatever the shape of the file: the texts of every item, under the ids of the evaluation."""
    rows = dict({name: rows for name, (rows, _) in HUB.items()})
    rows["summarization"] = [{"article": "A long text about owls.", "abstract": "Owls."}]
    rows["meqsum"] = [{"CHQ": "A long question?", "Summary": "Short?"}]
    rows["mts_dialog"] = [{"ID": 0, "section_header": "HPI", "section_text": "Well.", "dialogue": "Doctor: Hi."}]
    path = lines(tmp_path / "test.jsonl", rows[task])
    made = Recipe.model_validate({
        "name": "t", "model": {"base": "builtin:tiny"}, "data": {"a": {"path": "builtin:notes", "kind": "clinical"}},
        "stages": [{"cpt": {"mix": {"a": 1}}}], "evaluate": {"tasks": [{"task": task, "path": str(path)}]},
    })  # fmt: skip
    looked_for, scored = benchmark_items(made), load(task, path).items
    assert [item.id for item in looked_for] == [item.id for item in scored]
    said = json.dumps(rows[task][0])
    assert all(json.dumps(text)[1:-1] in said for text in looked_for[0].texts) and looked_for[0].texts


def test_other_answer_sets_as_tasks(tmp_path):
    questions = {
        "questions": [{"id": "b", "body": "Q?", "type": "yesno", "exact_answer": "no", "ideal_answer": ["N."]}]
    }
    (tmp_path / "b.json").write_text(json.dumps(questions))
    assert load("bioasq", tmp_path / "b.json").items[0].gold == "N."
    assert load("bioasq_yesno", tmp_path / "b.json").items[0].gold == 0
    row = [{"Question": "Q?", "Focus (Drug)": "x", "Answer": "A.", "URL": "u"}]
    for task in ("medicationqa", "medquad", "liveqa"):
        assert load(task, lines(tmp_path / "m.jsonl", row)).items[0].gold == "A."
    assert load("aci_bench", lines(tmp_path / "a.jsonl", [{"dialogue": "D", "note": "N"}])).items[0].gold == "N"
