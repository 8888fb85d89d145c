"""The available training methods."""

from collections.abc import Callable
from typing import Any

from tunery.spec import MethodOptions
from worker.trainer.methods.dpo import DirectPreferenceOptimization
from worker.trainer.methods.method import Method
from worker.trainer.methods.sft import SupervisedFineTuning

METHODS: dict[str, Callable[[Any], Method]] = {
    "supervised": lambda _options: SupervisedFineTuning(),
    "dpo": DirectPreferenceOptimization,
}
"""By `type`: the function that creates a run's method from its options. A plug-in adds its own."""


def make(options: MethodOptions) -> Method:
    """Returns the method of a run."""
    return METHODS[options.type](options)
