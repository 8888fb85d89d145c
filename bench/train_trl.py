"""Runs TRL's SFTTrainer, plain, with Liger or with Unsloth, on train_ours.py's rows in the same order.

With `--job-rows` on those of job_speed.py; there every token is labelled, while a job labels those of answers alone.

Prints one JSON line like that of train_ours.py for each of `--runs` runs. After the first a run trains the same model
further, its packages, kernels and memory ready. `--wait`: it imports everything, then waits for a line on standard
input.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

if "--unsloth" in sys.argv:  # it patches the packages imported after it
    os.environ.update(UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_SKIP_TORCHVISION_CHECK="1", TRANSFORMERS_OFFLINE="1")
    from unsloth import FastLanguageModel

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.train_rows import as_a_job_reads, in_order, lengths, of_lengths
from worker.trainer import experts

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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


def _plain(a: argparse.Namespace):
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ) if a.method == "qlora" else None  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        a.model, dtype=torch.bfloat16, quantization_config=quantisation, device_map={"": 0}, attn_implementation="sdpa"
    )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return model, AutoTokenizer.from_pretrained(a.model), None if a.method == "full" else lora


def _unsloth(a: argparse.Namespace):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(a.model), max_seq_length=a.seq, load_in_4bit=a.method == "qlora", dtype=torch.bfloat16,
        full_finetuning=a.method == "full",
    )  # fmt: skip
    if a.method != "full":
        model = FastLanguageModel.get_peft_model(
            model, r=16, target_modules=LINEARS, lora_alpha=32, lora_dropout=0, bias="none", random_state=0,
            use_gradient_checkpointing="unsloth" if a.ckpt else False,
        )  # fmt: skip
    return model, tokenizer, None


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
    parser.add_argument("--unsloth", action="store_true")
    parser.add_argument("--lengths", choices=["full", "long", "real"], default="full")
    parser.add_argument("--rows", type=int, help="of the whole run; with --packing it has as many steps as they fill")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--job-rows", action="store_true")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--wait", action="store_true")
    a = parser.parse_args()
    if a.wait:
        sys.stdin.readline()
    began = time.monotonic()
    model, tokenizer, lora = _unsloth(a) if a.unsloth else _plain(a)
    clock, wanted = Clock(a.skip), lengths(a.lengths, a.rows or a.steps * a.bs)
    wanted = [min(length, a.seq) for length in wanted]
    made = as_a_job_reads(a.model, wanted) if a.job_rows else in_order(of_lengths(wanted))
    settings = SFTConfig(
        output_dir="/tmp/trl", per_device_train_batch_size=a.bs, gradient_accumulation_steps=1,
        packing=a.packing, **({"num_train_epochs": 1} if a.packing else {"max_steps": a.steps}),
        learning_rate=1e-4, lr_scheduler_type="constant", bf16=True, optim=a.optim, max_length=a.seq,
        logging_steps=1, save_strategy="no", report_to="none", dataset_num_proc=None,
        **({} if a.unsloth else {
            "gradient_checkpointing": bool(a.ckpt), "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "use_liger_kernel": bool(a.liger),
            # Liger's experts replace PEFT's forward, and with it the adapters.
            "liger_kernel_config": {"swiglu": False} if experts.are_in(model.config) else None,
        }),
    )  # fmt: skip
    trainer = InOrder(
        model=model, args=settings, processing_class=tokenizer, callbacks=[clock],
        train_dataset=Dataset.from_dict({"input_ids": made}),
        **({"peft_config": lora} if lora else {}),
    )  # fmt: skip
    loaded = time.monotonic() - began
    for _ in range(a.runs):
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        print("RESULT " + json.dumps(figures(a, trainer, clock, made) | {"load_s": round(loaded, 1)}), flush=True)


def figures(a: argparse.Namespace, trainer: SFTTrainer, clock: Clock, made: list[list[int]]) -> dict[str, Any]:
    """Returns the figures of the run that has just ended; `made`: its rows."""
    steps = trainer.state.max_steps
    # Packing changes the rows' order, so only the mean number of tokens per step is known.
    measured = made if a.packing else made[a.skip * a.bs : steps * a.bs]
    tokens = sum(map(len, measured)) * ((steps - a.skip) / steps if a.packing else 1)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "stack": "trl-unsloth" if a.unsloth else "trl-liger" if a.liger else "trl",
        "method": a.method, "ckpt": a.ckpt, "seq": a.seq, "bs": a.bs,
        "steps": steps, "optim": a.optim, "lengths": a.lengths, "packing": a.packing,
        "tok_s": round(tokens / (clock.ended - clock.began)), "tokens_a_step": round(tokens / (steps - a.skip)),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "losses": [round(entry["loss"], 4) for entry in history],
        "grad_norms": [round(entry["grad_norm"], 4) for entry in history],
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }  # fmt: skip


if __name__ == "__main__":
    main()
