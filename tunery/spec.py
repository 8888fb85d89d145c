"""What a training run is to do: the one description that the API fills, the row keeps and the trainer reads.

Pure pydantic. Each technique owns only its own knobs, so that "a rank on a full fine-tune" cannot be said.
`"auto"` stands until the files have been read; `Plan` then holds a number for every one of them.
"""

from datetime import datetime
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from tunery.errors import InvalidValue, Unsupported
from tunery.field_reasons import formed

Auto = Literal["auto"]
MAX_RANK = 512
LEARNING_RATES = (1e-12, 1.0)
"""The least and the highest learning rate of a request, both far beyond anything sensible.

AdamW moves a weight by at most about the learning rate in a step (Kingma & Ba 2015, arXiv:1412.6980, section 2.1). The
weights of a trained base are far smaller than 1: a step of 1 destroys them, and one of 1e-12 is lost in their rounding.
"""


def _refuse_booleans(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")  # noqa: TRY004 (pydantic collects ValueErrors only)
    return value


NO_BOOLEAN = BeforeValidator(_refuse_booleans)
"""For numbers: to Python, and so to pydantic, true is 1. Why not strict ones: they refuse 3.0 and "3" too, which say
what they mean. In an `Annotated` it stands behind the bounds, or the schema would not show them."""
Int = Annotated[int, NO_BOOLEAN]
Float = Annotated[float, NO_BOOLEAN]


ModuleName = Annotated[
    str,
    *formed(
        r"[\w.]+", "the name of a layer, of letters, digits, '_' and '.', such as 'q_proj'; patterns are not supported"
    ),
]


class Part(BaseModel):
    """A sealed piece of a spec: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Full(Part):
    """Every weight learns."""

    type: Literal["full"] = "full"
    weights_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Type of the weights on a GPU: bfloat16 with stochastic rounding (6 bytes per weight, with its "
        "gradient and moments), or float32 (16 bytes). A CPU always uses float32",
    )


class Lora(Part):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) in fp32 on a frozen bf16 base."""

    type: Literal["lora"] = "lora"
    r: Int = Field(16, ge=1, le=MAX_RANK, description="Rank of the low-rank update")
    alpha: Float = Field(32.0, gt=0, le=4096, description="Scale: the update is multiplied by alpha / r")
    dropout: Float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input")
    target_modules: Literal["all-linear"] | list[ModuleName] = Field(
        "all-linear", description="Names of the linear layers to adapt; all-linear: all but the head"
    )
    use_rslora: bool = Field(
        False, description="Multiply by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023, arXiv:2312.03732)"
    )
    use_dora: bool = Field(
        False, description="Also learn the magnitude of each output's weights (Liu et al. 2024, arXiv:2402.09353)"
    )
    lora_plus_ratio: Float = Field(
        1.0,
        ge=1,
        le=256,
        description="LoRA+: ratio of the learning rate of B to that of A (Hayou et al. 2024, arXiv:2402.12354)",
    )
    modules_to_save: list[ModuleName] | None = Field(
        None, min_length=1, description="Modules that are trained and saved in full, such as lm_head"
    )
    trainable_token_indices: list[Annotated[int, Field(ge=0), NO_BOOLEAN]] | None = Field(
        None, min_length=1, max_length=10_000, description="Tokens whose rows of the embedding and the head are trained"
    )
    precision: Literal["bf16", "fp8"] = Field(
        "bf16",
        description="Precision of matrix products with the frozen base on a GPU: bf16, or fp8 (e4m3), which is faster "
        "but less exact",
    )

    @model_validator(mode="after")
    def _names_some_layer(self) -> "Lora":
        if not self.target_modules:
            raise ValueError("target_modules is empty: list at least one layer, or use 'all-linear'")
        return self

    @model_validator(mode="after")
    def _names_each_token_once(self) -> "Lora":
        tokens = self.trainable_token_indices or []
        if len(set(tokens)) < len(tokens):
            raise ValueError("trainable_token_indices lists a token twice: list each once")
        return self


class Qlora(Lora):
    """LoRA on a base in 4 bits (Dettmers et al. 2023, arXiv:2305.14314)."""

    type: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type")
    double_quant: bool = Field(True, description="Also quantise the quantisation constants")
    compute_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Data type of matrix products")

    @model_validator(mode="after")
    def _multiplies_in_its_compute_dtype(self) -> "Qlora":
        if self.precision == "fp8" and (self.quant_type, self.compute_dtype) != ("nf4", "bfloat16"):
            raise ValueError(
                "precision fp8 requires quant_type nf4 and compute_dtype bfloat16: change these, or use precision bf16"
            )
        return self


Technique = Annotated[Full | Lora | Qlora, Field(discriminator="type")]


class MethodOptions(Part):
    """How a run learns from its rows. Each method is a subclass with its own `type` and knobs, an entry of METHODS."""

    rows_an_example: ClassVar[int] = 1
    """Rows of tokens that are learned together, so that the memory for all of them is needed at once."""
    rate_share: ClassVar[float] = 1.0
    """The method's default learning rate over that of supervised fine-tuning."""

    type: str

    def decided(self) -> Self:
        """Returns the options with a value for every "auto"."""
        return self


LossOn = Literal["assistant", "last_assistant", "all"]
"""Which tokens of a chat are learned: those of assistant messages, of the last one alone, or all of them."""


CutAnswers = Literal["limit", "drop", "keep"]
"""What becomes of rows that lose a part of an answer to the token limit: `TrainingOptions.cut_answers` says it."""


class SupervisedKnobs(Part):
    """The hyperparameters that supervised training has besides those of every method."""

    loss_on: LossOn = Field(
        "assistant",
        description="Tokens that are trained: those of assistant messages, of the last one only, or all, prompts "
        "included",
    )


class Supervised(SupervisedKnobs, MethodOptions):
    """Learns every labelled token of a row by its cross entropy."""

    type: Literal["supervised"] = "supervised"


class DpoKnobs(Part):
    """The hyperparameters that preference tuning has besides those of every method."""

    beta: Annotated[float, Field(gt=0, le=10), NO_BOOLEAN] | Auto = Field(
        "auto", description="Strength of the constraint to the reference model. auto: 0.1, or 5 if loss is dpo_norm"
    )
    loss: Literal["sigmoid", "ipo", "dpo_norm"] = Field(
        "sigmoid",
        description="DPO's logistic loss, IPO's squared loss, or the logistic loss of mean log-probabilities per token",
    )


class Dpo(DpoKnobs, MethodOptions):
    """Learns to prefer one of two answers (Rafailov et al. 2023, arXiv:2305.18290).

    The variants: IPO (Azar et al. 2023, arXiv:2310.12036), and DPO normalised by length (Lambert et al. 2024,
    arXiv:2411.15124).
    """

    rows_an_example = 2
    # LoRA: 1e-5 at a width of 4096, a full fine-tune 1e-6. Published DPO runs of 7B and 8B models took 5e-6 with
    # adapters (alignment-handbook's zephyr-7b-dpo-qlora), 5e-7 without (arXiv:2310.16944, arXiv:2411.15124).
    rate_share = 1 / 30

    type: Literal["dpo"] = "dpo"

    def decided(self) -> Self:
        # 0.1: DPO's paper and OpenAI's example. 5: a mean over tokens is smaller than their sum (arXiv:2411.15124).
        auto = 5.0 if self.loss == "dpo_norm" else 0.1
        return self.model_copy(update={"beta": auto}) if self.beta == "auto" else self


METHODS: dict[str, type[MethodOptions]] = {"supervised": Supervised, "dpo": Dpo}
"""By `type`. A plug-in adds its own."""


def find_method(name: str) -> type[MethodOptions]:
    """The class of a method's options. Raises Unsupported, naming the methods that there are."""
    if name not in METHODS:
        known = " or ".join(f"'{known}'" for known in METHODS)
        instead = f"Use method.type {known}, with technique full, lora or qlora."
        raise Unsupported(param="method.type", what=f"Method '{name}'", instead=instead)
    return METHODS[name]


def _read_method(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(name := value.get("type"), str):
        return find_method(name).model_validate(value)
    return value


Method = Annotated[SerializeAsAny[MethodOptions], BeforeValidator(_read_method)]


class Schedule(Part):
    """How the learning rate moves: up over the warmup, then down to `min_ratio` of its peak (or flat)."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Float = Field(0.05, ge=0, le=1, description="Fraction of all steps in which the rate rises")
    min_ratio: Float = Field(0.0, ge=0, le=1, description="Ratio of the last learning rate to the highest")


class EarlyStopping(Part):
    """Stop when the metric has not improved for `patience` evaluations; needs a validation file."""

    patience: Int = Field(3, ge=1, le=100)
    min_delta: Float = Field(0.0, ge=0)
    metric: Literal["loss", "task"] = Field(
        "loss", description="The full validation loss, or the task's score, which needs evaluation.task_rows"
    )


_BENCHMARK = formed(
    r"default|lm_eval:[\w.-]+",
    "'default', the built-in questions (of ARC-Easy, PIQA and OpenBookQA), or a multiple-choice task of "
    "lm-evaluation-harness as 'lm_eval:NAME', such as 'lm_eval:hellaswag'",
)


class General(Part):
    """What is measured besides the task, of base and tuned model: multiple-choice questions, and the KL of the tuned
    model to its base on prompts with human answers. Both ship with Tunery."""

    enabled: bool = Field(True, description="false: score only the test file")
    benchmark: Annotated[str, *_BENCHMARK] = Field(
        "default",
        description="The built-in questions, or a multiple-choice task of lm-evaluation-harness as `lm_eval:NAME`",
    )
    items: Annotated[int, Field(ge=1), NO_BOOLEAN] | Auto = Field(
        "auto", description="Number of questions, a fixed sample; auto: 100 on a CPU, all 800 on a GPU"
    )
    prompts: Annotated[int, Field(ge=0), NO_BOOLEAN] | Auto = Field(
        "auto", description="Number of prompts, a fixed sample; auto: 20 on a CPU, all 100 on a GPU"
    )


class Evaluation(Part):
    """What is measured besides the training loss."""

    every_steps: Annotated[int, Field(ge=1), NO_BOOLEAN] | Auto = Field(
        "auto", description="Steps between full validation losses; auto: at the end of each epoch"
    )
    test_file: str | None = Field(None, description="Rows answered greedily by base and tuned model after training")
    max_new_tokens: Annotated[int, Field(ge=1, le=4096), NO_BOOLEAN] | Auto = Field(
        "auto", description="Token limit of these answers; auto: set by the longest expected one"
    )
    max_rows: Int = Field(1000, ge=1, description="Maximum number of test rows, from the start of the file")
    task_rows: Int = Field(
        0, ge=0, le=1000, description="Validation rows that the model answers at every evaluation, spread over the file"
    )
    general: General = Field(
        General(), description="General ability of base and tuned model beside the task; requires a test file"
    )
    unquantised: bool = Field(False, description="QLoRA: also score base and tuned model with the base in bf16")


class Gate(Part):
    """What the tuned model has to show before it is published: each limit is held against the 95 % interval of what
    was measured, so that chance neither passes nor fails a model."""

    min_task_gain: Annotated[float, Field(ge=-1, le=1), NO_BOOLEAN] | None = Field(
        None,
        description="Minimum gain over the base on the test file, by the scorecard's primary metric: 0.05 is 5 points",
    )
    max_general_drop: Annotated[float, Field(ge=0, le=1), NO_BOOLEAN] | None = Field(
        None, description="Maximum drop of the general benchmark's accuracy below the base's: 0.02 is 2 points"
    )
    max_kl: Annotated[float, Field(ge=0), NO_BOOLEAN] | None = Field(
        None, description="Maximum KL divergence from the base on general prompts, in nats per token"
    )
    on_inconclusive: Literal["publish", "withhold"] = Field(
        "publish", description="What happens to a model if an interval contains a limit"
    )

    @model_validator(mode="after")
    def _demands_something(self) -> "Gate":
        if self.min_task_gain is None and self.max_general_drop is None and self.max_kl is None:
            raise ValueError("sets no limit: send min_task_gain, max_general_drop or max_kl")
        return self


GgufType = Literal["f16", "q8_0", "q4_0", "q4_1"]


_REPLAY_SOURCE = formed(
    r"self|file-[\w-]+",
    "'self', the built-in prompts answered by the base itself, or the id of a file of general rows, such as "
    "'file-abc123'",
)


class Replay(Part):
    """General rows mixed into training, so that the model keeps what it could do before."""

    share: Float = Field(0.1, gt=0, le=0.5, description="Fraction of an epoch's rows that are replay rows")
    source: Annotated[str, *_REPLAY_SOURCE] = Field(
        "self",
        description="self: the built-in prompts, answered by the base itself; or the id of a file of general rows",
    )
    max_new_tokens: Int = Field(
        160, ge=16, le=4096, description="Token limit of the base's own answers; only complete answers are used"
    )


class Export(Part):
    """Files for other programs, made of the model at the run's end beside the model's own."""

    merged: bool = Field(
        False, description="LoRA, QLoRA: also export a whole model, with the adapter merged into its base"
    )
    gguf: list[GgufType] = Field([], description="Also export GGUF files of the whole model, for llama.cpp and ollama")
    fp8: bool = Field(False, description="Also export the whole model with fp8 linear layers, for vLLM")
    adapter_gguf: bool = Field(False, description="LoRA, QLoRA: also export the adapter alone as a GGUF file")

    @property
    def needs_merge(self) -> bool:
        """Whether an adapter has to be merged into its base."""
        return self.merged or self.fp8 or bool(self.gguf)

    @property
    def is_asked(self) -> bool:
        """Whether there is anything to write."""
        return self.needs_merge or self.adapter_gguf


ColumnName = Annotated[str, Field(min_length=1, max_length=200)]


class Columns(Part):
    """The columns of the job's files, where these have names of their own. No other column is read."""

    messages: ColumnName | None = Field(None, description="The whole conversation")
    prompt: ColumnName | None = Field(None, description="The user's message")
    completion: ColumnName | None = Field(None, description="The answer")
    system: ColumnName | None = None
    context: ColumnName | None = Field(None, description="Text before the prompt")
    history: ColumnName | None = Field(None, description="Earlier turns")
    tools: ColumnName | None = None
    text: ColumnName | None = Field(None, description="Plain text, every token of which is trained")
    chosen: ColumnName | None = Field(None, description="The preferred answer")
    rejected: ColumnName | None = Field(None, description="The other answer")

    @property
    def named(self) -> dict[str, str]:
        """The columns that are given, by part."""
        return self.model_dump(exclude_none=True)

    @property
    def spelled(self) -> str:
        """The columns as a query and `--columns` have them, which `datasets.columns` reads."""
        if any("," in name or name != name.strip() for name in self.named.values()):
            return self.model_dump_json(exclude_none=True)
        return ",".join(f"{part}={name}" for part, name in self.named.items())

    @model_validator(mode="after")
    def _makes_rows(self) -> "Columns":
        given = self.named
        if not any(parts <= given.keys() for parts in _WHOLE_ROWS):
            raise ValueError(
                "does not define a whole row: send prompt and completion, chosen and rejected, messages, or text"
            )
        if len(set(given.values())) < len(given):
            raise ValueError("names a column twice: give each part its own column")
        return self


def named_columns(columns: Columns | None) -> dict[str, str]:
    """The columns by part; empty where rows are read by their own names."""
    return {} if columns is None else columns.named


_WHOLE_ROWS = ({"messages"}, {"text"}, {"prompt", "completion"}, {"chosen", "rejected"})


Sharding = Literal["auto", "replicate", "full_shard"]


class Resources(Part):
    """What the run needs of a host."""

    gpus: Annotated[Literal[1, 2, 4, 8], NO_BOOLEAN] = 1
    sharding: Sharding = Field(
        "auto",
        description="Whether each of several GPUs holds the whole model or a shard of it; auto: shards if one GPU is "
        "too small",
    )
    force: bool = Field(
        False,
        description="Try the run even if, by the estimate, no device here has the minimum memory for it",
    )


class Hyperparameters(Part):
    """OpenAI's three settings, auto or numbers."""

    n_epochs: Annotated[int, Field(ge=1, le=50), NO_BOOLEAN] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=256), NO_BOOLEAN] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0), NO_BOOLEAN] | Auto = "auto"


def check_one_rate(learning_rate: float | None, hyperparameters: Hyperparameters) -> None:
    """Raises InvalidValue when both set the learning rate."""
    if learning_rate is not None and hyperparameters.learning_rate_multiplier != "auto":
        reason = "learning_rate and learning_rate_multiplier both set the learning rate. Send one of them."
        raise InvalidValue(param="learning_rate", reason=reason)


TechniqueT = TypeVar("TechniqueT")
RateT = TypeVar("RateT")


class TrainingOptions(Part, Generic[TechniqueT, RateT]):
    """The options of a run. Requests, specs, plans and answers inherit them, so each is declared here alone.

    The type parameters are the types of `technique` and `learning_rate`, which a request may leave open and a plan may
    not. Their default of None is validated: it is an error where the type has no None.
    """

    technique: TechniqueT = Field(
        None, validate_default=True, description="Absent: LoRA if the base fits in bf16, otherwise QLoRA; never full"
    )
    learning_rate: RateT = Field(None, validate_default=True, description="In place of learning_rate_multiplier")
    columns: Columns | None = Field(None, description="The files' columns by part, if they have other names")
    schedule: Schedule = Schedule()
    max_seq_length: Int = Field(
        2048, ge=16, le=1_048_576, description="Maximum tokens of a row; longer rows are truncated at the end"
    )
    cut_answers: CutAnswers = Field(
        "keep",  # as rows were trained before there was a choice; a request's default is another
        description="Rows that lose part of their answer to max_seq_length: 'limit' leaves them out, and fails the job "
        "if they are more than 1 % of the training file; 'drop' leaves out any number; 'keep' trains on the rest of "
        "them",
    )
    packing: bool = Field(False, description="Pack several rows into a sequence, each attending only to itself")
    weight_decay: Float = Field(0.0, ge=0, le=1)
    max_grad_norm: Float = Field(1.0, gt=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="8-bit: moments in 8 bits for fp32 weights; paged: moments move to host memory if the GPU's is "
        "short",
    )
    neftune_noise_alpha: Float = Field(
        0.0, ge=0, le=100, description="NEFTune: scale of the noise on the embeddings in training; 0: none"
    )
    replay: Replay | None = Field(None, description="General rows mixed into the task's, against forgetting")
    early_stopping: EarlyStopping | None = Field(None, description="Needs a validation file")
    select: Literal["last", "best"] = Field(
        "last", description="Which step becomes the model; best requires a validation file"
    )
    keep_checkpoints: Int = Field(
        3, ge=0, le=50, description="Number of newest epoch-end checkpoints to keep, besides the best"
    )
    evaluation: Evaluation = Evaluation()
    gate: Gate | None = Field(None, description="Conditions for publishing the model. Requires a test file")
    export: Export = Export()
    resources: Resources = Resources()


Seed = Annotated[int, Field(ge=0, le=2**31 - 1), NO_BOOLEAN]


class RequestedOptions(
    TrainingOptions[Technique | None, Annotated[float, Field(gt=0, le=LEARNING_RATES[1]), NO_BOOLEAN] | None]
):
    """The options of a request, which may leave technique and learning rate to the server."""


class TrainingSpec(RequestedOptions):
    """A request for a run, as stored with its job. Technique absent: LoRA where bf16 fits, else QLoRA, never full."""

    method: Method = Supervised()
    seed: Seed
    hyperparameters: Hyperparameters = Hyperparameters()

    @model_validator(mode="after")
    def _one_learning_rate(self) -> "TrainingSpec":
        check_one_rate(self.learning_rate, self.hyperparameters)
        return self


class Plan(TrainingOptions[Technique, Annotated[float, Field(gt=0)]]):
    """A spec with every "auto" decided, by `planning.advice`, once the files have been read."""

    method: Method = Supervised()
    seed: Seed
    n_epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="Rows per step over all GPUs")
    learning_rate_multiplier: float = Field(gt=0)


class ExportOrder(Part):
    """`export.json`: what is to be exported of a model that is there already, and what it was trained with."""

    export: Export
    model: str
    trained_with: Technique
    method: Method = Supervised()
    columns: Columns | None = None
    row_tokens: int = Field(
        TrainingOptions.model_fields["max_seq_length"].default, description="Longer rows are truncated"
    )


class ImportOrder(Part):
    """`import.json`: an adapter that was trained elsewhere. `source`: its archive's name. `facts`: of its base."""

    source: str
    base_model: str
    trained_with: Literal["lora", "qlora"] = "lora"
    facts: dict[str, Any] = Field(default_factory=dict)


class Run(Part):
    """`spec.json` of a run directory: all that a trainer is given.

    The directory holds `spec.json`, `base/` (safetensors, tokenizer, chat template), `data/train.jsonl`, maybe
    `data/valid.jsonl`, `data/test.jsonl`, `data/replay.jsonl`, `adapter/` (an adapter to continue from), `resume/` (a
    snapshot of an earlier attempt), `scores/` (what bases scored on the general benchmark and answered for replay) and
    `prepared/` (tokens of files), both shared by the host's runs. The trainer writes `out/` (the artifact),
    `checkpoints/step-N/` (artifacts at epoch ends), `snapshots/step-N/` (recovery), `greedy.jsonl` (answers to test
    rows), new files in `scores/` and `prepared/`, and nothing else.
    """

    version: Literal[1] = 1
    job: str = Field(description="The job's id, used only in messages")
    base_model: str = Field(description="Registered name, written into the adapter's base_model_name_or_path")
    plan: Plan
    public_checkpoints: int = Field(3, ge=0, description="Newest epoch-end checkpoints to keep, besides the best")
    now: datetime | None = Field(
        None,
        description="The current time for chat templates: the same in every attempt, or a resumed run would see other "
        "rows",
    )
    snapshot_seconds: float = Field(300, gt=0, description="Time between recovery snapshots")
    facts: dict[str, Any] = Field(default_factory=dict, description="Provenance to copy into training_config.json")
