"""Loads multiple-choice tasks of lm-evaluation-harness, if it is installed, as items of this benchmark.

The package provides the task, its rows and its prompt with few-shot examples; the likelihoods are computed here. The
rows come from the task's own source, mostly the Hugging Face hub.
"""

import importlib
import os
from itertools import groupby
from typing import Any

from tunery.failures import BenchmarkUnavailable
from worker.trainer.general.benchmark import Item, sample

TASKS = "TUNERY_LM_EVAL_TASKS"
"""The variable that names a folder of the operator's own tasks."""


def load_items(name: str, count: int | None) -> list[Item]:
    """Returns the task's test rows (or validation rows), or a seeded sample of them. Raises BenchmarkUnavailable."""
    try:
        tasks = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise BenchmarkUnavailable(name=name, reason="lm-eval is not installed on this worker") from error
    folder = os.environ.get(TASKS)
    try:
        found = tasks.TaskManager(include_path=folder).load([name])["tasks"]
    except Exception as error:  # of any class: the task's own code runs, and may download rows
        raise BenchmarkUnavailable(name=name, reason=f"lm-eval cannot load it ({error})") from error
    items = [item for task in found.values() for item in _items(name, task)]
    return sample(items, count)


def _items(name: str, task: Any) -> list[Item]:
    if task.OUTPUT_TYPE != "multiple_choice":
        raise BenchmarkUnavailable(name=name, reason=f"its answers are {task.OUTPUT_TYPE}, not choices")
    task.build_all_requests()
    by_doc = groupby(task.instances, key=lambda instance: instance.doc_id)
    items = [_item(name, task, list(instances)) for _, instances in by_doc]
    return [item for item in items if item is not None]


def _item(name: str, task: Any, instances: list[Any]) -> Item | None:
    """Returns the item; None for a row whose answer is none of its choices."""
    doc, choices = instances[0].doc, task.doc_to_choice(instances[0].doc)
    prefix, first = instances[0].args[:2]
    requests = instances[: len(choices)]  # further requests are for choices without their question
    if any(instance.args[0] != prefix for instance in requests):
        raise BenchmarkUnavailable(name=name, reason="its choices stand before different texts")
    answer = task.doc_to_target(doc)
    if isinstance(answer, str):
        answer = choices.index(answer) if answer in choices else -1
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        return None
    return Item(prefix, tuple(choices), answer, first.removesuffix(choices[0]))
