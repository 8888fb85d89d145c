"""TRL's SFTTrainer on the same rows in the same order: one JSON line like train_ours.py's."""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.train_rows import in_order, rows


class InOrder(SFTTrainer):
    def _get_train_sampler(self, *_args, **_kwargs):
        return SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    def __init__(self, skip: int) -> None:
        self.skip, self.began, self.ended = skip, 0.0, 0.0

    def on_step_end(self, _args, state, _control, **_kwargs):
        if state.global_step in (self.skip, state.max_steps):
            torch.cuda.synchronize()
            now = time.monotonic()
            self.began, self.ended = (now, 0.0) if state.global_step == self.skip else (self.began, now)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--method", choices=["full", "lora", "qlora"], required=True)
    parser.add_argument("--ckpt", type=int, default=1)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--bs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--skip", type=int, default=6)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--liger", type=int, default=0)
    a = parser.parse_args()
    began = time.monotonic()
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ) if a.method == "qlora" else None  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        a.model, dtype=torch.bfloat16, quantization_config=quantisation, device_map={"": 0}, attn_implementation="sdpa"
    )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock(a.skip)
    settings = SFTConfig(
        output_dir="/tmp/trl", per_device_train_batch_size=a.bs, gradient_accumulation_steps=1, max_steps=a.steps,
        learning_rate=1e-4, lr_scheduler_type="constant", bf16=True, optim=a.optim, max_length=a.seq,
        gradient_checkpointing=bool(a.ckpt), gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1, save_strategy="no", report_to="none", use_liger_kernel=bool(a.liger),
    )  # fmt: skip
    trainer = InOrder(
        model=model, args=settings, processing_class=AutoTokenizer.from_pretrained(a.model), callbacks=[clock],
        train_dataset=Dataset.from_dict({"input_ids": in_order(rows(a.steps * a.bs, a.seq))}),
        **({} if a.method == "full" else {"peft_config": lora}),
    )  # fmt: skip
    loaded = time.monotonic() - began
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    print("RESULT " + json.dumps({
        "stack": "trl-liger" if a.liger else "trl", "method": a.method, "ckpt": a.ckpt, "seq": a.seq, "bs": a.bs,
        "steps": a.steps, "optim": a.optim,
        "tok_s": round((a.steps - a.skip) * a.bs * a.seq / (clock.ended - clock.began)),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2), "load_s": round(loaded, 1),
        "losses": [round(entry["loss"], 4) for entry in history],
        "grad_norms": [round(entry["grad_norm"], 4) for entry in history],
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
