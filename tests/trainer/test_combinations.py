"""Trains combinations of options and compares every step, and the model that is left, with a loop in plain torch.

The loop computes one row at a time with transformers' eager attention, PEFT's own layers and torch's AdamW, by the
recipe of docs/techniques.md.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from run_folders import Ear, chat, lay_out, plan, said
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tunery.spec import Dpo, EarlyStopping, Evaluation, Full, Lora, Plan, Replay, Schedule
from worker.trainer import run
from worker.trainer.data import Example
from worker.trainer.replay import mixing
from worker.trainer.report import MessageWriter
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Training

# PEFT searches modules for the ranks that it gave to experts' parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")


@dataclass(frozen=True)
class Case:
    """`config`: the arguments of plain PEFT beside rank and alpha; None: every weight learns. `memory`: of the plan."""

    family: str
    plan: dict[str, Any]
    config: dict[str, Any] | None
    memory: dict[str, Any] = field(default_factory=dict)


def chats(first: int, count: int) -> list[dict[str, Any]]:
    """Returns chats of two turns, the first of which some leave out of the loss."""
    rows = []
    for i in range(first, first + count):
        (asked, first_answer), last = chat(i)["messages"], chat(100 + i, words=1 + i % 7)["messages"]
        rows.append({"messages": [asked, first_answer | {"weight": i % 2}, *last]})
    return rows


def pairs(first: int, count: int) -> list[dict[str, Any]]:
    made = []
    for i in range(first, first + count):
        asked, better = chat(i)["messages"]
        worse = better | {"content": better["content"] + " beta" * (1 + 2 * (i % 3))}
        made.append({"input": {"messages": [asked]}, "preferred_output": [better], "non_preferred_output": [worse]})
    return made


CASES = {
    "whole head and rows of tokens, packed": Case(
        "Mistral",
        {
            "technique": Lora(
                r=2,
                alpha=7.5,
                use_rslora=True,
                lora_plus_ratio=4,
                modules_to_save=["lm_head", "norm"],
                trainable_token_indices=[1, 90],
            ),
            "packing": True,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "replay": Replay(share=0.3, source="file-general"),
        },
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "modules_to_save": ["lm_head", "norm"],
            "trainable_token_indices": {"embed_tokens": [1, 90]},
        },
    ),
    "dora, recomputed, the best step": Case(
        "Qwen3",
        {
            "technique": Lora(r=2, alpha=8, use_dora=True, target_modules=["q_proj", "down_proj"]),
            "schedule": Schedule(type="linear", warmup_ratio=0.4, min_ratio=0.2),
            "early_stopping": EarlyStopping(patience=1, min_delta=0.2),
            "evaluation": Evaluation(every_steps=1),
            "weight_decay": 0.3,
            "cut_answers": "drop",
            "max_seq_length": 100,
        },
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        memory={"max_tokens": 100, "recompute": 1},
    ),
    "router whole, one row a pass": Case(
        "Qwen3-MoE",
        {"technique": Lora(r=2, alpha=8, target_modules=["q_proj", "o_proj"], modules_to_save=["gate"])},
        {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["gate"]},
        memory={"max_tokens": 1},
    ),
    "pairs on both sides of a RoPE limit": Case(
        "Phi-3 longrope",
        {"technique": Lora(r=2, alpha=8, lora_plus_ratio=2), "method": Dpo(loss="ipo", beta=0.5), "packing": True},
        {"target_modules": "all-linear"},
    ),
    "full, tied, of pairs": Case(
        "Qwen2",
        {"technique": Full(), "method": Dpo(loss="dpo_norm"), "weight_decay": 0.3, "max_grad_norm": 0.3},
        None,
    ),
}


@dataclass
class Plain:
    """The loop's model. `starts`: the log-probabilities of rows before training, by their tokens."""

    model: Any
    plan: Plan
    starts: dict[tuple[int, ...], float] = field(default_factory=dict)

    def log_probabilities(self, row: Any) -> Tensor:
        logits = self.model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        losses: Tensor = functional.cross_entropy(logits, labels, reduction="none")
        return -losses[labels >= 0]

    def loss(self, examples: list[Example]) -> Tensor:
        """Returns the mean over all labelled tokens, or over pairs."""
        if not isinstance(self.plan.method, Dpo):
            return -torch.cat([self.log_probabilities(example.rows[0]) for example in examples]).mean()
        return torch.stack([self._of_pair(example, self.plan.method.decided()) for example in examples]).mean()

    def _of_pair(self, pair: Example, method: Dpo) -> Tensor:
        gained = []
        for row in pair.rows:
            each = self.log_probabilities(row)
            start = self.starts.setdefault(tuple(row.input_ids), float(each.sum().detach()))
            gained.append((each.sum() - start) / len(each))
        lead, beta = gained[0] - gained[1], float(method.beta)
        return (lead - 1 / (2 * beta)) ** 2 if method.loss == "ipo" else -functional.logsigmoid(beta * lead)

    @torch.no_grad()
    def measure(self, examples: list[Example]) -> float:
        self.model.eval()
        found = float(self.loss(examples))
        self.model.train()
        return found


def plain(base: Path, case: Case, technique: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if case.config is None:
        return model.train()
    config = LoraConfig(r=technique.r, lora_alpha=technique.alpha, task_type="CAUSAL_LM", **case.config)
    return get_peft_model(model, config).train()


def optimizer(parameters: dict[str, Any], settled: Plan) -> torch.optim.Optimizer:
    """Decays matrices alone; B learns at LoRA+'s ratio, whole modules and rows of tokens at a tenth."""
    groups = []
    for name, parameter in parameters.items():
        factor = getattr(settled.technique, "lora_plus_ratio", 1) if ".lora_B." in name else 1
        factor *= 0.1 if "modules_to_save" in name or "trainable_tokens" in name else 1
        decay = settled.weight_decay if parameter.dim() > 1 else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "factor": factor})
    return torch.optim.AdamW(groups)


def rate(settled: Plan, step: int, total: int) -> float:
    schedule = settled.schedule
    warmup = round(schedule.warmup_ratio * total)
    if step <= warmup:
        return settled.learning_rate * step / (warmup + 1)
    part = (step - 1 - warmup) / max(1, total - warmup - (schedule.min_ratio > 0))
    fall = 1 - part if schedule.type == "linear" else 0.5 * (1 + math.cos(math.pi * part))
    return settled.learning_rate * (schedule.min_ratio + (1 - schedule.min_ratio) * fall)


def steps(loop: Plain, t: Training, parameters: dict[str, Any]) -> Iterator[tuple[float, float]]:
    """Yields each step's loss and the gradient's norm, once it is taken."""
    settled, optimiser = loop.plan, optimizer(parameters, loop.plan)
    for step in range(1, t.total_steps + 1):
        drawn = mixing.examples_of_step(t.rows, step, settled.batch_size, settled.seed)
        optimiser.zero_grad()
        loss = loop.loss([t.rows.examples[i] for i in drawn])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), settled.max_grad_norm)
        for group in optimiser.param_groups:
            group["lr"] = rate(settled, step, t.total_steps) * group["factor"]
        optimiser.step()
        yield loss.item(), norm.item()


@dataclass
class Ran:
    """A run that the trainer has carried out: its weights before the first step, by PEFT's names, and its messages."""

    t: Training
    weights: dict[str, Tensor]
    ear: Ear


def carried_out(folder: Path, case: Case, monkeypatch: pytest.MonkeyPatch, ear: Ear) -> Ran:
    prepare, found = run.prepare, []

    def preparing(*args: Any) -> Training:
        t = prepare(*args)
        t.stepper.adopt(replace(t.stepper.memory, **case.memory))
        found.append((t, {name.removeprefix("model."): p.detach().clone() for name, p in t.parameters.items()}))
        return t

    monkeypatch.setattr(run, "prepare", preparing)
    assert run.carry_out(folder, MessageWriter(ear.descriptor), StopSignal())
    [(t, weights)] = found
    return Ran(t, weights, ear)


def compare_steps(ran: Ran, loop: Plain, parameters: dict[str, Tensor]) -> None:
    """Compares all steps and evaluations; leaves the weights of the step that becomes the model."""
    valid: Any = ran.t.valid
    found, evaluated = said(ran.ear, "step"), {each.step: each.loss for each in said(ran.ear, "evaluated")}
    chosen: dict[str, Tensor] = {}
    for step, (loss, norm) in zip(found, steps(loop, ran.t, parameters), strict=False):
        assert (step.train_loss, step.grad_norm) == pytest.approx((loss, norm), rel=1e-3), step.step
        if step.step in evaluated:
            assert evaluated[step.step] == pytest.approx(loop.measure(list(valid.examples)), rel=1e-3)
        if step.step == (min(evaluated, key=lambda each: evaluated[each]) if ran.t.keeps_best else len(found)):
            chosen = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert len(found) == (max(evaluated) if ran.t.keeps_best else ran.t.total_steps)
    copy(chosen, parameters)


@torch.no_grad()
def copy(weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_run_is_that_of_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ear: Ear, case: Case) -> None:
    settled = plan(**{"n_epochs": 2, "batch_size": 3, "learning_rate": 2e-3, "max_seq_length": 256} | case.plan)
    base = zoo.make(case.family, tmp_path / "base")
    rows = pairs if isinstance(settled.method, Dpo) else chats
    folder = lay_out(tmp_path / "run", base, settled, rows(0, 8), rows(20, 3), public_checkpoints=0)
    (folder / "data" / "replay.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats(40, 5)))
    ran = carried_out(folder, case, monkeypatch, ear)
    loop = Plain(plain(base, case, settled.technique), settled)
    parameters = {name: p for name, p in loop.model.named_parameters() if p.requires_grad}
    copy(ran.weights, parameters)
    loop.measure([*ran.t.rows.examples, *(ran.t.valid or ran.t.rows).examples])  # the start, of which a pair's loss is

    compare_steps(ran, loop, parameters)

    loaded: Any = AutoModelForCausalLM.from_pretrained(base if case.config else folder / "out", dtype=torch.float32)
    if case.config:
        loaded = PeftModel.from_pretrained(loaded, str(folder / "out"))
    ids = torch.tensor([ran.t.rows.rows[0].input_ids])
    with torch.no_grad():
        logits, wanted = (each.eval()(ids).logits for each in (loaded, loop.model))
    assert (logits - wanted).norm() < (2e-2 if case.config is None else 1e-3) * wanted.norm()
