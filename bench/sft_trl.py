"""Runs TRL's SFTTrainer for sft.py on rows of ids in the given order; prints one JSON line of its losses."""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


class AsGiven(SFTTrainer):
    """Uses the ids as they are, the rows in their order, and the given learning rates."""

    rates: list[float]

    def _get_train_sampler(self, *_args, **_kwargs):
        return SequentialSampler(self.train_dataset)

    def create_scheduler(self, num_training_steps, optimizer=None):  # noqa: ARG002  # it overrides transformers' own
        chosen = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = LambdaLR(chosen, lambda step: self.rates[min(step, len(self.rates) - 1)])
        return self.lr_scheduler


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    model = AutoModelForCausalLM.from_pretrained(given["base"], dtype="float32", attn_implementation="sdpa")
    if given["adapter"]:
        model = PeftModel.from_pretrained(model, given["adapter"], is_trainable=True)
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch, per_device_train_batch_size=given["micro_batch"],
            gradient_accumulation_steps=given["micro_batches"], num_train_epochs=1, learning_rate=1.0,
            weight_decay=given["weight_decay"], max_grad_norm=given["max_grad_norm"], max_length=None,
            padding_free=given["padding_free"], dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1, save_strategy="no",
            report_to="none",
        )  # fmt: skip
        trainer = AsGiven(
            model=model,
            args=settings,
            processing_class=AutoTokenizer.from_pretrained(given["base"]),
            train_dataset=Dataset.from_list(given["rows"]),
        )
        trainer.rates = given["rates"]
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = [{"loss": entry["loss"], "grad_norm": entry["grad_norm"]} for entry in history]
    packages = ("trl", "torch", "transformers", "peft", "accelerate", "datasets")
    print("RESULT " + json.dumps({"steps": steps, "versions": {name: version(name) for name in packages}}), flush=True)


if __name__ == "__main__":
    main()
