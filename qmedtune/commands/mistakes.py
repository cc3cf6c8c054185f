"""Answers to command lines that cannot be parsed: what is wrong, an example that is right, where to look.

Words that other tools have for the same thing are known here, because people bring them along. Deliberately not here:
mistakes in recipes (parsing/) and in what a command is given (each module says its own).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qmedtune.commands.examples import EXAMPLES

COMMANDS = {
    "train": "run", "finetune": "run", "fine-tune": "run", "pretrain": "run", "cpt": "run", "sft": "run",
    "resume": "run", "evaluate": "eval", "test": "selftest", "infer": "predict", "inference": "predict",
    "generate": "predict",
    "serve": "export", "convert": "export", "ui": "watch", "dashboard": "watch", "list": "runs", "ls": "runs",
    "status": "runs", "info": "doctor", "env": "doctor", "download": "fetch", "check": "plan", "validate": "plan",
    "preprocess": "data", "tokenize": "data", "show": "data show", "keys": "recipe", "config": "recipe",
}  # fmt: skip
AGAIN = "a run goes on by itself: give the same command again"
OPTIONS = {
    "--resume": AGAIN,
    "--resume-from-checkpoint": AGAIN,
    "--continue": AGAIN,
    "--output": "--out DIR",
    "--output-dir": "--out DIR",
    "-o": "--out DIR",
    "--config": "the recipe is the first word: qmedtune run RECIPE",
    "--recipe": "the recipe is the first word: qmedtune run RECIPE",
    "--model": "the model is the first word; of a recipe: --set model.base=MODEL",
    "--base-model": "--set model.base=MODEL",
    "--lr": "--set stages[0].cpt.lr=1e-4",
    "--learning-rate": "--set stages[0].cpt.lr=1e-4",
    "--epochs": "--set stages[1].sft.epochs=2",
    "--batch-size": "--set stages[0].cpt.batch=16",
    "--seed": "--set seed=18",
    "--dry-run": "qmedtune plan RECIPE",
    "--verbose": "--debug, which shows tracebacks",
    "-v": "--version, or --debug, which shows tracebacks",
    "--num-gpus": "--gpus N",
    "--nproc-per-node": "--gpus N",
    "--device": "CUDA_VISIBLE_DEVICES in the environment",
    "--gpu": "--gpus N, or CUDA_VISIBLE_DEVICES in the environment",
    "--4bit": "--set model.quantization=nf4",
    "--load-in-4bit": "--set model.quantization=nf4",
}

# The same for what only some commands take.
DATA = {"--input": "--data FILE", "--file": "--data FILE", "--dataset": "--data FILE", "--input-file": "--data FILE"}
TASKS = {"--task": "--tasks TASK", "--benchmark": "--tasks TASK", "--benchmarks": "--tasks TASK"}
FORMS = {"--format": "--as gguf", "--type": "--as gguf", "--to": "--as gguf", "--outtype": "--quant q8_0"}
FORMS |= {"--quantization": "--quant q8_0", "--quantize": "--quant q8_0"}
OPTIONS_OF = {"predict": DATA, "eval": DATA | TASKS, "compare": TASKS, "export": FORMS}


def usage_lines(message: str, words: Sequence[str], known: Sequence[str]) -> list[str]:
    """Lines for the usage error `message` about the command line `words`; `known`: the commands there are."""
    command = next((word for word in words if not word.startswith("-")), "")
    first, *choices = message.replace("Value error, ", "").splitlines()
    lines = [" ".join([first, *(choice.strip() for choice in choices)])]
    if command not in known:
        lines += _for_command(command)
        return [*lines, "see: qmedtune --help"]
    if option := re.match(r"No such option: (-[\w-]+)", message):
        if better := OPTIONS_OF.get(command, {}).get(option[1]) or OPTIONS.get(option[1]):
            lines[0] = f"No such option: {option[1]}; here it is: {better}"
    elif command in EXAMPLES:
        lines.append(f"example: {EXAMPLES[command][0]}")
    return [*lines, f"see: qmedtune {command} --help"]


def _for_command(command: str) -> list[str]:
    if command.endswith((".yaml", ".yml")):
        return [f"did you mean: qmedtune run {command}"]
    if command in COMMANDS:
        return [f"here it is: qmedtune {COMMANDS[command]}"]
    return []
