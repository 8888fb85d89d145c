"""Runs TRL's DPOTrainer for preferences.py on pairs of ids in the given order; prints one JSON line of its losses."""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


class AsGiven(DPOTrainer):
    """Uses the ids as they are, and the pairs in their order."""

    def _prepare_dataset(self, dataset, *_args, **_kwargs):
        return dataset

    def _get_train_sampler(self, *_args, **_kwargs):
        return SequentialSampler(self.train_dataset)


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    model, start = (AutoModelForCausalLM.from_pretrained(given["base"], dtype="float32") for _ in range(2))
    if given["adapter"]:  # it is switched off for the reference
        model, start = PeftModel.from_pretrained(model, given["adapter"], is_trainable=True), None
    with tempfile.TemporaryDirectory() as scratch:
        settings = DPOConfig(
            output_dir=scratch, per_device_train_batch_size=given["batch"], num_train_epochs=1,
            learning_rate=given["rate"], lr_scheduler_type="constant", weight_decay=0.0,
            max_grad_norm=given["max_grad_norm"], beta=given["beta"], loss_type=[given["loss"]], max_length=None,
            gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1, save_strategy="no",
            report_to="none", disable_dropout=True,
        )  # fmt: skip
        trainer = AsGiven(
            model=model,
            ref_model=start,
            args=settings,
            processing_class=AutoTokenizer.from_pretrained(given["base"]),
            train_dataset=Dataset.from_list(given["pairs"]),
        )
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = [{"loss": entry["loss"], "margin": entry["rewards/margins"]} for entry in history]
    packages = ("trl", "torch", "transformers", "peft", "accelerate", "datasets")
    print("RESULT " + json.dumps({"steps": steps, "versions": {name: version(name) for name in packages}}), flush=True)


if __name__ == "__main__":
    main()
