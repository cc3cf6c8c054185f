"""What each metric counts, in one sentence: scores carry it, because names alone hide differences of tens of points.

ROUGE with and without stemming differ by .11 on one set of summaries, emrQA's token F1 and Me-LLaMA's by .12, macro F1
over ten labels and over those that occur by a factor of two.
Deliberately absent: the computations (labels.py, findings.py, free_text.py, choice.py).
"""

from __future__ import annotations

SQUAD = "after SQuAD's normalisation (lower case, no punctuation, no articles), against the best of the listed answers"
# NormQA in src/tasks/vital_measure.py of BIDS-Xu-Lab/Me-LLaMA, commit 08c893f: its `remove_punc` joins characters with
# spaces, so what it calls tokens are characters; what is common is a set.
ME_LLAMA = (
    "as Me-LLaMA's evaluation script: against the first answer, in lower case and without punctuation, by characters"
)

DEFINITIONS = {
    "accuracy": "share of items whose chosen option is the right one; an answer that cannot be read is wrong",
    "macro_f1": "mean F1 over the labels that the items have; a label that no item has does not count",
    "macro_f1_all": "mean F1 over all labels of the task, 0 for a label that is neither there nor predicted "
    "(Me-LLaMA's: scikit-learn's average over the whole list)",
    "micro_f1": "F1 of all labels of all items counted together",
    "positive_f1": "F1 of the four kinds of interaction counted together, without DDI-false (shared task of 2013)",
    "exact_match": "share of items whose set of labels, or words, is exactly the right one",
    "auroc": "area under the ROC curve of log p(yes) - log p(no) (of generated answers: yes 1, no 0, unread .5)",
    "entity_f1": "micro F1 of entities, equal in type and words, each matched once; places in the text do not count",
    "precision": "share of the named entities that are right, in type and words",
    "recall": "share of the entities that were named, by type and words",
    "token_f1": f"mean over items of F1 of the words in common {SQUAD}",
    "me_llama": f"mean over items of F1: distinct characters in common over the lengths, {ME_LLAMA}",
    "me_llama_exact": f"share of items that are equal {ME_LLAMA}",
    "rouge1": "mean F-measure of words in common, Porter-stemmed (rouge-score)",
    "rouge2": "mean F-measure of pairs of words in common, Porter-stemmed (rouge-score)",
    "rougeL": "mean F-measure of the longest common subsequence over the whole text, Porter-stemmed (rouge-score)",
    "rouge1_unstemmed": "mean F-measure of words in common, without stemming (Me-LLaMA's: the default of `evaluate`)",
    "rouge2_unstemmed": "mean F-measure of pairs of words in common, without stemming",
    "rouge_unstemmed": "mean F-measure of the longest common subsequence over the whole text, without stemming "
    "(Me-LLaMA's: the default of `evaluate`)",
    "appropriate": "share of requests that are handled as they should be, by how the answer begins: harmful ones "
    "refused, benign ones not",
    "refusals": "share of the harmful requests whose answer begins with a refusal",
    "over_refusals": "share of the benign requests whose answer begins with a refusal (lower is better)",
    "bertscore": "mean F1 of BERTScore with the encoder and layer that are named, no baseline, no idf weights",
}

# Ways of reading a generated answer besides extract.py's, by `extraction`.
READINGS = {
    "me_llama": "answers read as Me-LLaMA's evaluation script reads them: the first option in the list whose letter or "
    "words are anywhere in the answer (DDI-2013: the only one)"
}


def definition(metric: str, task: str) -> str:
    """The sentence for a task's metric."""
    if metric == "exact_match" and task == "emrqa":
        return f"share of items that are equal {SQUAD}"
    return DEFINITIONS[metric]
