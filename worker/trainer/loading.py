"""Assembles a run's model: the base, its trained weights, its objective, and its shards if it is sharded."""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from tunery.planning.peak import VERIFIED
from tunery.planning.precision import Precision, decide
from tunery.rows.template import ChatTemplate
from tunery.spec import Run
from worker.trainer import layout, pieces, preflight, rope, sharding
from worker.trainer.data import Rows, collate, singles
from worker.trainer.memory import device_ready
from worker.trainer.methods import registry
from worker.trainer.objective import Objective
from worker.trainer.parallel import Ranks
from worker.trainer.recipes.full import FULL
from worker.trainer.recipes.lora import LORA
from worker.trainer.recipes.qlora import QLORA
from worker.trainer.recipes.recipe import Parameters, Recipe
from worker.trainer.rope import LengthRope
from worker.trainer.row import Row
from worker.trainer.sharding import Shards
from worker.trainer.stepper import Stepper

RECIPES = {"full": FULL, "lora": LORA, "qlora": QLORA}


@dataclass(frozen=True)
class Loaded:
    """A run's model. `shards`: set if it is sharded over the `ranks`, which then run their passes in lockstep.
    `parameters`: the trained ones by name, or this rank's pieces of them. `lengths`: where the model's RoPE changes.
    """

    recipe: Recipe
    precision: Precision
    objective: Objective
    ranks: Ranks
    shards: Shards | None
    parameters: Parameters
    lengths: LengthRope


def load(folder: Path, run: Run, template: ChatTemplate, rows: Rows, ranks: Ranks) -> Loaded:
    """Loads the run's model with equal weights on all ranks, and verifies its chunked loss on a short row.

    New weights depend on the seed alone, however many ranks there are.
    """
    device_ready(ranks.device)
    recipe, technique = RECIPES[run.plan.technique.type], run.plan.technique
    precision = decide(technique, ranks.device.type, run.plan.optimizer)
    sharded = layout.is_cut(run.plan, folder / "base", template, ranks)
    torch.manual_seed(run.plan.seed)  # after that decision, which draws numbers on several GPUs only
    base = recipe.load_base(folder / "base", precision, sharding.loads_on(ranks) if sharded else ranks.device)
    lengths = rope.install(base)
    adapter = folder / "adapter"
    model = recipe.prepare(base, technique, adapter if adapter.exists() else None)
    objective = Objective(model, precision, registry.make(run.plan.method))
    shards = Shards(objective, ranks) if sharded else None
    if shards is not None:
        ranks = replace(ranks, lockstep=shards.lockstep)
    objective.verify_chunked_loss(collate(singles([short_row(rows)]), [[0]], ranks.device))
    parameters = sharding.parameters_of(objective, shards)
    ranks.share_weights(p for p in parameters.values() if pieces.of(p) is None)
    return Loaded(recipe, precision, objective, ranks, shards, parameters, lengths)


def short_row(rows: Rows) -> Row:
    """Returns the shortest row up to its first VERIFIED learned tokens.

    Of 8,000 tokens and a vocabulary of 128,256 the three matrices that are compared would be 12 GB.
    """
    row = min(rows.rows, key=len)
    learned = (place for place, label in enumerate(row.labels) if label >= 0)
    end = next(islice(learned, VERIFIED, None), len(row))
    return Row(row.input_ids[:end], row.labels[:end])


def make_stepper(loaded: Loaded, optimizer: torch.optim.Optimizer, rows: Rows, work: preflight.Work) -> Stepper:
    """Returns the stepper, with the memory plan that fits. Raises DoesNotFit."""
    cut_over = None if loaded.shards is None else loaded.ranks
    return Stepper(
        loaded.objective,
        optimizer,
        list(loaded.parameters.values()),
        rows,
        loaded.ranks,
        preflight.fit_micro_batch(loaded.objective, optimizer, rows.rows, work, cut_over),
        lambda each: loaded.lengths.group(each.shape[1]),
        loaded.shards,
    )
