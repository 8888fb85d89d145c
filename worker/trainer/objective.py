"""The objective: a method's sums over a micro-batch, from the losses of its labelled tokens."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from tunery.planning.precision import Precision
from worker.trainer import precision, rope
from worker.trainer.data import RECTANGLES_TO, Batch
from worker.trainer.kernels import adapters, casts, cross_entropy, decoder
from worker.trainer.kernels.recomputation import Recomputation
from worker.trainer.memory import release, shortage_noticed
from worker.trainer.methods.method import Method
from worker.trainer.methods.sft import SupervisedFineTuning
from worker.trainer.neftune import Noise

_HEAD_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier")
"""Config entries of models that do more to their logits than one product (Gemma 2, Granite, Cohere, Falcon H1)."""


class Objective(nn.Module):
    """A causal model with its loss: `objective(batch, scale)` -> (`scale` times the sum of losses, number correct).

    `sums` has what its method minimises.
    """

    def __init__(self, model: nn.Module, kept_in: Precision | None = None, method: Method | None = None) -> None:
        super().__init__()
        self.model = model
        self.method: Method = method or SupervisedFineTuning()
        self._precision = kept_in
        self.causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.chunked = _is_plain_product(self.causal)
        self._recomputation = Recomputation(self.causal)
        self.is_sharded = False  # see sharding.py
        self.noise: Noise | None = None
        self.against_decoder: str | None = None  # why transformers generated the answers of the last evaluation
        self.knows_borders = decoder.borders_known(self.causal)
        self._casts: casts.Casts | None = None  # allocated by the first pass, on the device of the model
        self._lengths = rope.of(self.causal)

    @property
    def pad_to(self) -> tuple[int, int]:
        """To which multiples `data.collate` pads passes that are not recorded."""
        on_gpu = next(self.parameters()).is_cuda
        return RECTANGLES_TO if on_gpu and not self._lengths else (1, 1)

    def forward(self, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        if not self.chunked:
            return cross_entropy.plain(self._logits(batch), batch.targets, scale)
        return cross_entropy.scaled(*self._factors(batch), batch.targets, scale)

    def sums(self, batch: Batch, scale: float) -> dict[str, Tensor]:
        """Returns the method's sums over the batch; "loss" is `scale` times its sum."""
        return self.method.objective(self, batch, scale)

    def row_losses(self, batch: Batch) -> Tensor:
        """Returns the sum of the losses [rows] of each row's labelled tokens, in the order of `batch.labelled`."""
        if self.chunked:
            losses = cross_entropy.each(*self._factors(batch), batch.targets)
        else:
            losses = functional.cross_entropy(self._logits(batch).float(), batch.targets, reduction="none")
        return torch.stack([part.sum() for part in losses[: sum(batch.labelled)].split(batch.labelled)])

    def row_logits(self, batch: Batch) -> Iterator[Tensor]:
        """Yields each row's logits [labelled, vocabulary] in fp32, in the order of `batch.labelled`."""
        if self.chunked:
            hidden, head = self._factors(batch)
            return ((part @ head.t()).float() for part in hidden.split(batch.labelled))
        return (part.float() for part in self._logits(batch).split(batch.labelled))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Returns the context of passes, in which the model multiplies in its precision's type.

        Adapters are cast to that type on entry: their weights must not change inside.
        """
        with precision.autocast(self._precision, next(self.parameters()).device), casts.using(self._adapters_cast()):
            yield

    def add_noise(self, alpha: float) -> None:
        """Adds NEFTune's noise to every training pass; none if `alpha` is 0."""
        self.noise = Noise(self.causal, alpha) if alpha else None

    def rest(self) -> None:
        """Frees the weights that the last pass gathered, if the model is sharded."""
        if self.is_sharded:
            cast(FSDPModule, self).reshard()

    @property
    def layers(self) -> int:
        """The number of layers whose activations can be recomputed."""
        return len(self._recomputation.layers)

    @property
    def recomputes(self) -> int:
        """How many layers' activations the backward pass recomputes instead of keeping them."""
        return self._recomputation.count

    @property
    def draws_again(self) -> bool:
        """Whether recomputed layers may draw random numbers, the same again."""
        return self._recomputation.draws

    def recompute(self, layers: int | None = None, *, offload: bool = False) -> None:
        """Makes the backward pass recompute the activations of the first `layers`, by default of all.

        `offload`: the inputs of these layers are kept in the host's memory.
        """
        self._recomputation.of(self.layers if layers is None else layers, offload=offload)

    def with_least_memory(self, run: Callable[[], None]) -> None:
        """Runs what passes the model once; if memory is too short, again with all layers recomputed and their inputs in
        the host's memory, then as before. Raises torch.OutOfMemoryError if that does not fit either.
        """
        before = self._recomputation.count, self._recomputation.offloads
        try:
            run()
        except torch.OutOfMemoryError:
            if before == (self.layers, True):
                raise
        else:
            return
        self.recompute(offload=True)
        release(next(self.parameters()).device)
        try:
            run()
        finally:
            self.recompute(before[0], offload=before[1])

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Returns the context of a forward and a backward pass. One that fails leaves nothing begun, and raises
        torch.OutOfMemoryError for any shortage of the device's memory.
        """
        try:
            with shortage_noticed():
                yield
        except RuntimeError:
            self._recomputation.abandon()
            raise

    @torch.no_grad()
    def verify_chunked_loss(self, batch: Batch) -> None:
        """Compares the head's product with the model's own logits; the loss is not chunked if they differ.

        `_HEAD_CHANGES` lists what models are known to do to their logits; a new architecture may use another name, and
        a loss that is wrong by a factor still falls.
        """
        if not self.chunked:
            return
        self.eval()
        hidden, head = self._factors(batch)
        product, logits = (hidden @ head.t()).float(), self._logits(batch).float()
        tolerance = 1e-4 if head.dtype == torch.float32 else 1e-2
        self.chunked = bool((product - logits).norm() <= tolerance * logits.norm())

    def _adapters_cast(self) -> casts.Casts | None:
        if self.is_sharded:
            return None
        if self._casts is None:
            self._casts = adapters.casts_of(self.causal)
        self._casts.update()
        return self._casts

    def _factors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the last hidden states [labelled, width] at the labelled positions, and the head's weight."""
        head: Tensor = self.causal.get_output_embeddings().weight
        with self.computing(), self._rows_apart(batch):
            hidden = _labelled(self.causal.base_model(**self._inputs(batch)).last_hidden_state, batch)
        if self._precision is not None and self._precision.autocast:  # autocast does not apply inside the chunked loss
            compute = precision.dtype(self._precision.compute)
            return hidden.to(compute), head.to(compute)
        return hidden, head.to(hidden.dtype)  # a head in modules_to_save is trained in fp32

    def _logits(self, batch: Batch) -> Tensor:
        """Returns the model's own logits [labelled, vocabulary] at the same positions."""
        with self.computing(), self._rows_apart(batch):
            return _labelled(self.causal(**self._inputs(batch)).logits, batch)

    def _rows_apart(self, batch: Batch) -> AbstractContextManager[None]:
        """Returns the context in which RoPE's frequencies are those of each row's own length."""
        return rope.rows_apart(self.causal, self._lengths, batch.lengths) if self._lengths else nullcontext()

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        if self.noise is not None:
            self.noise.expect(batch)
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        if batch.mask is not None:
            return inputs | {"attention_mask": batch.mask}
        if batch.borders is None:
            return inputs
        # A mask of four axes is passed on unchanged: without one, transformers checks the positions for packed rows,
        # which waits for the device, and builds a mask of length x length. The fast layers read the borders instead.
        nothing = batch.input_ids.new_zeros(1, 1, 1, 1)
        return inputs | {"attention_mask": nothing, "borders": batch.borders}


def _labelled(states: Tensor, batch: Batch) -> Tensor:
    return states.reshape(-1, states.shape[-1]).index_select(0, batch.label_positions)


def _is_plain_product(causal: Any) -> bool:
    """Whether the logits are the last hidden state times the head's weight and nothing else."""
    head = causal.get_output_embeddings()
    config = causal.config.get_text_config()
    changed = any(getattr(config, name, None) not in (None, 1, 1.0, False) for name in _HEAD_CHANGES)
    backbone = causal.base_model
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module
    return type(head) is nn.Linear and head.bias is None and backbone is not causal and not changed


def all_and_trainable(model: nn.Module) -> tuple[int, int]:
    """Returns the numbers of all and of trained parameters; a 4-bit weight counts as many as it had before packing."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable
