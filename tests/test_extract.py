"""What an answer states: menus, echoes and denials state nothing; the ways in which models write an answer do.

python tests/test_extract.py        # precision and recall on the labelled answers, by part
"""

import json
from pathlib import Path

import pytest

from qmedtune.tasks.extract import extract_choice

LETTERS = "ABCD"
ANTIGENS = ("Anti C", "Anti D", "Anti E", "Anti Lewis")
DRUGS = ("Aspirin", "Clopidogrel", "Heparin", "Warfarin")
DECISIONS = ("yes", "no", "maybe")
LABELLED = Path(__file__).parent / "data" / "answers.jsonl"

MENUS = [
    "A. Anti C\nB. Anti D\nC. Anti E\nD. Anti Lewis", "A) Anti C B) Anti D C) Anti E D) Anti Lewis",
    "Options: A. Anti C, B. Anti D, C. Anti E, D. Anti Lewis", "(A) Anti C (B) Anti D", "A, B, C or D",
    "- A. Anti C\n- B. Anti D", "1. A. Anti C\n2. B. Anti D", "Anti C\nAnti D\nAnti E\nAnti Lewis",
    "A: Anti C\nB: Anti D", "A or B", "Both A and B are correct.", "Choose one of A, B, C, D.",
    "The options are A, B, C, and D.", "Which one? A. Anti C B. Anti D C. Anti E D. Anti Lewis", "Answer: A, B",
    "The answer is either A or B.", "The answer could be A or C", "Anti C, Anti D, Anti E, Anti Lewis",
    "**A.** Anti C\n**B.** Anti D\n**C.** Anti E", "a) Anti C\nb) Anti D\nc) Anti E", "A | B | C | D",
    "None of the above", "I cannot answer this", "A. Anti C\nB. Anti D\nC", "C. Anti E\nThe correct answer is D.",
    "C. Anti D", "The answer is: D. Anti E", "B. Anti D\n\nThe answer is C. Anti E.",
    "The answer is A. The answer is B.",
    "A 26-year-old woman needs blood. Which antibody does she have?", "A patient with anti-D",
    "The question asks which of A. Anti C and B. Anti D it is.", "Answer:\nA. Anti C\nB. Anti D\nC. Anti E",
    "Question: Which antibody?\nA. Anti C\nB. Anti D\nC. Anti E\nD. Anti Lewis", "A. or B.", "A/B/C/D",
    "[A] Anti C [B] Anti D [C] Anti E", "A = Anti C, B = Anti D", "Anti C or Anti D", "It depends on the patient.",
]  # fmt: skip
DRUG_MENUS = [
    "Aspirin or clopidogrel could be used.", "Aspirin and heparin", "Both aspirin and warfarin are options",
    "Neither aspirin nor heparin", "Aspirin (A) or heparin (C)", "It is not aspirin", "Aspirin is wrong",
    "A is incorrect", "Not A", "A. Aspirin is incorrect.", "aspirin, clopidogrel, heparin, warfarin",
    "Aspirin is given with heparin.", "A patient with heparin-induced", "I would not give heparin.", "Is it heparin?",
    "Heparin is contraindicated.", "A) B) C) D)", "Question: which drug?\nA. Aspirin", '{"answer": ["A", "C"]}',
    "Aspirin? Heparin?", "Aspirin vs. heparin", "Heparin can be ruled out.",
]  # fmt: skip
ECHOES = [
    "Yes or no", "yes and no", "Yes/No/Maybe", "Yes, no or maybe.", "yes|no|maybe", "Answer yes, no or maybe.",
    "Does it work? Answer yes, no or maybe.", "no evidence supports this", "No evidence supports this.",
    "No significant difference was found", "Yes. No.", "Neither yes nor no", "It is both yes and no.",
    "Is the drug effective?", "Yes - or no?", "Answer: yes/no/maybe", "Answer yes or no: ", "The answer is yes or no.",
    "(yes/no/maybe)", "yes, maybe", "Yes\nNo\nMaybe", "no clear answer", "There is no answer", "no-one knows",
    "Maybe yes, maybe no", "The study found no effect.", "yes or no or maybe", "[yes, no, maybe]",
    "Possible answers: yes, no, maybe", "Do we know? No one knows.", "No, the answer is not yes, no, or maybe.",
    "The answer is yes. The answer is no.", "Yes\n\nThe answer is no.",
    "Question: Is it safe?\nAnswer yes, no or maybe.",
    "No. of patients: 20", "yes, the answer is yes, no, maybe.", "The drug may be of use.",
]  # fmt: skip


@pytest.mark.parametrize("answer", MENUS)
def test_menus_and_several_letters_state_nothing(answer):
    assert extract_choice(answer, LETTERS, ANTIGENS) is None


@pytest.mark.parametrize("answer", DRUG_MENUS)
def test_several_texts_and_denied_ones_state_nothing(answer):
    assert extract_choice(answer, LETTERS, DRUGS) is None


@pytest.mark.parametrize("answer", ECHOES)
def test_echoes_and_everyday_words_state_nothing(answer):
    assert extract_choice(answer, DECISIONS) is None


STATED = {
    "A": [
        "I would go with option A.", "Choice: A", "The correct answer is therefore A. Aspirin",
        '```json\n{"answer": "A"}\n```', "Aspirin", "A. Aspirin, because the others act later",
    ],
    "B": [
        "<answer>B</answer>", '{"answer": "B"}', "Option B is correct.", "$\\boxed{\\text{B}}$",
        "The correct option is (b).", "B. Clopidogrel\n\nQuestion: What is next?\nA. x\nB. y\nAnswer: A",
        "Answer: B\n\nExplanation: A is wrong because aspirin bleeds.", "The answer should be B because it is",
        "A. Aspirin\nB. Clopidogrel\nC. Heparin\nD. Warfarin\n\nAnswer: B", "Answer - B", "B: Clopidogrel",
        "**Answer:** B", "Ans. B", "ANSWER: B", "The correct answer is not A, but B.", "B is right.",
        '{"answer": "B", "explanation": "A is wrong"}', "The answer is letter B", "Answer:\n\nB",
        "B\nExplanation: ...", "answer=B", "I'd choose B", "[ANSWER] B", "<|answer|>B", "Result: B", "I think B",
        "Most likely B.", "Probably B.", "The answer is B and not C.", "A is wrong, C is wrong. Therefore B.",
        "First I thought so. The answer is A. No: the answer is B.",
        "B. Clopidogrel\n\nWhich drug is given next?\nA. Aspirin\nB. Clopidogrel\nC. Heparin\nAnswer: C",
    ],
    "C": [
        "<final>C</final>", '{"answer_idx": "C"}', "<b>C</b>", "Answer \u2013 C", "<option>C</option>",
        "Therefore, C is correct.", "C is the correct answer", "The most likely diagnosis is C.", "\\boxed{C}",
        "Final Answer: **C**", "I choose C.", "So it's C.", "A is incorrect. B is incorrect. C is correct.",
        "The patient should get heparin.", "C. Heparin is given because aspirin and warfarin act slowly.",
        '{"answer": "Heparin"}', "correct answer: (C) Heparin", "Thus, the answer is: C", "(C)", "[C]", "C)",
        "Option C", "option c: Heparin", "<choice>C</choice>", "Heparin is the correct answer.",
        "The answer would be C, Heparin.", "Among the options, C is the best choice.", "Ans: C", "Correct answer: C",
        "Let me think.\nFirst, aspirin acts on platelets.\nSecond, heparin acts at once.\nSo the answer is C.",
        "Answer (C)", 'The answer is "C".', "I believe the answer is C, not A.", "A: The correct answer is C.",
        "A. Aspirin\nB. Clopidogrel\nC. Heparin\nThe answer is: C. Heparin",
        "B. Clopidogrel\n\nThis is incorrect. The correct answer is C. Heparin.",
    ],
    "D": [
        "The final answer is $\\boxed{D}$.", "My answer: D. Warfarin", "The best treatment would be warfarin",
        "{'choice': 'D'}", "Answer is D", "The right choice is option D, warfarin.", "D. Warfarin.",
        "Based on the above, option (D) is the most appropriate.", "It is warfarin that fits best; the others do not",
        "The answer is clearly D!", "Only D is correct.", "I'd pick warfarin.", '{"choice": "D", "reason": "slow"}',
    ],
}  # fmt: skip


@pytest.mark.parametrize(("letter", "answer"), [(letter, answer) for letter in STATED for answer in STATED[letter]])
def test_one_stated_letter_or_text_is_read(letter, answer):
    assert extract_choice(answer, LETTERS, DRUGS) == LETTERS.index(letter)


DECIDED = {
    "yes": [
        "Final decision: yes", '{"final_decision": "yes"}', "Yes, because it helps.", "Yes - it does", "\\boxed{yes}",
        "yes it does", "Based on the abstract, the answer is yes.", "**Yes**", "Yes!", "The effect was large.\n\nYes",
        "So, yes.", "I would say yes.", "The study shows an effect, so the answer is yes.", "It's a yes.",
        "Answer: yes\nReason: no harm", "the answer is definitely yes", "Label: yes", "The answer's yes",
        "The answer to the question above is yes.", "In short: yes.", "Probably yes", "Fortunately, yes.",
    ],
    "no": [
        "No, it does not", "No. This is not shown.",
        "final_decision: no", "No; the trial failed", "The answer is no because no effect was seen", "Therefore: no.",
        'The answer to the question is "no".', "No.\n\nQuestion: Is it?\nYes", "NO", "Decision: no", "No, no.",
        "Answer: no, there was no difference.", "Unfortunately, no.", 'No, the answer is not "yes."',
    ],
    "maybe": [
        "Conclusion: maybe", "<answer>maybe</answer>", "My answer is maybe.", 'The correct answer is "maybe"',
        "Maybe. The evidence is mixed.", "In conclusion, the answer is maybe.",
        "In conclusion, maybe.", "Overall, maybe.",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("word", "answer"), [(word, answer) for word in DECIDED for answer in DECIDED[word]])
def test_one_stated_word_is_read(word, answer):
    assert extract_choice(answer, DECISIONS) == DECISIONS.index(word)


SPECIES = ("E. coli", "C. difficile", "S. aureus", "B. cereus")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C. difficile", "B"), ("The answer is C. difficile.", "B"), ("B. cereus", "D"), ("B. C. difficile", "B"),
        ("A. E. coli", "A"), ("D. B. cereus is right", "D"), ("C. S. aureus", "C"), ("C", "C"),
    ],
)  # fmt: skip
def test_a_species_is_not_the_letter_of_its_genus(answer, letter):
    assert extract_choice(answer, LETTERS, SPECIES) == LETTERS.index(letter)
    if answer == "C. difficile":
        assert extract_choice(answer, LETTERS, DRUGS) is None


def test_options_that_share_their_beginning_are_told_apart():
    texts = ("loss of taste", "loss of taste and hearing", "hearing alone", "0.5-1 kg")
    assert extract_choice("The answer is loss of taste and hearing.", LETTERS, texts) == 1
    assert extract_choice("A. Loss of taste and hearing", LETTERS, texts) is None
    assert extract_choice("It usually weighs 0.5-1 kg.", LETTERS, texts) == 3
    assert extract_choice("", LETTERS, texts) is None and extract_choice("\n \n", DECISIONS) is None


@pytest.mark.parametrize("seed", range(20))
def test_long_and_odd_answers_are_read_in_no_time(seed):
    """Repetitions and brackets as broken models write them: linear time, no error."""
    import random
    import time

    pieces = ["The answer is ", "(A) ", "A, B, ", "no ", "\n", "[[", "**", "is ", "Question: ", "\\boxed{", "option "]
    text = "".join(random.Random(seed).choices(pieces, k=800))
    started = time.process_time()
    extract_choice(text, LETTERS, DRUGS)
    extract_choice(text, DECISIONS)
    assert time.process_time() - started < 2


def labelled(part: int) -> list[dict]:
    rows = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["half"] == part]


def measure(rows: list[dict]) -> dict[str, float]:
    """Precision over what was read, recall over what is stated (`stated`: an index or None)."""
    read = [extract_choice(row["answer"], row["options"], row["texts"]) for row in rows]
    right = sum(found is not None and found == row["stated"] for found, row in zip(read, rows, strict=True))
    said, stated = sum(found is not None for found in read), sum(row["stated"] is not None for row in rows)
    return {"answers": len(rows), "stated": stated, "precision": right / max(1, said), "recall": right / max(1, stated)}


def test_precision_and_recall_on_real_answers():
    """Answers of SmolLM2-135M to MedQA, MedMCQA, MMLU and PubMedQA (all MIT), labelled by reading before this extractor
    was written (part 2: before it was run on them). It was written on part 0; part 1 was unseen and gave .959 and .986,
    then one kind was mended (the extractor before: .57 and .92); part 2, other prompts, was never looked at: .988, 1.
    """
    assert sum(len(labelled(part)) for part in (0, 1, 2)) > 400
    for part in (0, 1, 2):
        found = measure(labelled(part))
        assert found["precision"] >= 0.97 and found["recall"] >= 0.95, (part, found)


if __name__ == "__main__":
    for part in (0, 1, 2):
        print(json.dumps({"part": part, **measure(labelled(part))}))
