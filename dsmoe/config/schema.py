"""What can be configured: every key of a run, with its default, its meaning and its unit."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from os.path import expanduser
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

UserPath = Annotated[str, AfterValidator(expanduser)]  # ~ is the home folder, as in a shell


# Keys of dsmoe/moe/activations.py.
ExpertActivation = Literal["swiglu", "geglu", "geglu_tanh", "reglu", "swigluoai", "silu", "gelu", "relu", "relu2"]


class Section(BaseModel):
    """A part of the configuration: unknown keys and silent type conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TensorInitialization(Section):
    """Initial values of the matrices whose canonical name matches a pattern, in place of the default."""

    tensors: str = Field(min_length=1)  # shell pattern of names, such as *.experts.*.down_proj; * matches dots too
    distribution: Literal["normal", "uniform", "linear"] = "normal"  # linear: as torch.nn.Linear, uniform by fan-in
    std: float | None = Field(None, gt=0)  # of normal and uniform; linear: 1 / sqrt(3 fan_in)

    @model_validator(mode="after")
    def _check_std(self) -> TensorInitialization:
        if (self.std is None) != (self.distribution == "linear"):
            raise ValueError("std with normal and uniform, and no std with linear")
        return self

    def std_of(self, fan_in: int) -> float:
        """Standard deviation of the elements of a matrix [out, fan_in]."""
        return 1 / math.sqrt(3 * fan_in) if self.std is None else self.std


class ModelConfig(Section):
    """The transformer: Megatron-Core's names, RMSNorm and RoPE; SwiGLU where `expert_activation` says nothing else."""

    num_layers: int = Field(4, ge=1, le=10_000)  # transformer layers, attention and MLP each
    hidden_size: int = Field(256, ge=8)  # width of a token between layers
    num_attention_heads: int = Field(8, ge=1)  # query heads of a layer
    num_query_groups: int | None = Field(None, ge=1)  # key/value heads of GQA; None: as many as attention heads
    kv_channels: int | None = Field(None, ge=2)  # size of a head; None: hidden_size / num_attention_heads
    sequence_length: int = Field(256, ge=2)  # tokens
    vocab_size: int | None = Field(None, ge=2)  # None: the tokenizer's size, rounded up to a multiple of 64
    ffn_hidden_size: int | None = Field(None, ge=1)  # a dense layer's SwiGLU; None: 4 x moe_ffn_hidden_size
    num_experts: int = Field(8, ge=1)  # routed experts of an MoE layer
    moe_ffn_hidden_size: int = Field(512, ge=1)  # width of one expert
    expert_activation: ExpertActivation = "swiglu"  # of routed experts; names with glu are gated by a second projection
    expert_bias: bool = False  # whether each projection of a routed expert adds one
    moe_layer_freq: int | list[Literal[0, 1]] = 1  # n: every n-th from the first is MoE; list: 1 MoE, 0 dense
    moe_shared_expert_intermediate_size: int | None = Field(None, ge=1)  # of every token; None: no such expert
    moe_shared_expert_gate: bool = False  # its output times sigmoid(x w), as in Qwen2-MoE
    add_qkv_bias: bool = False  # biases of the projections to queries, keys and values
    tie_embeddings: bool = True  # one matrix for the input embedding and the output layer
    qk_layernorm: bool | Literal["full"] = False  # RMSNorm on queries and keys: per head; full: over all heads at once
    rotary_base: float = Field(10000.0, gt=0)  # theta of RoPE
    norm_epsilon: float = Field(1e-5, gt=0)  # added to the mean square in RMSNorm
    init_std: float = Field(0.02, gt=0)  # projections into the residual: init_std / sqrt(2 num_layers)
    initialization: list[TensorInitialization] = []  # exceptions to init_std; of several that match, the first
    recompute: Literal["none", "moe", "full"] = "none"  # redone in backward: nothing; experts; attention too
    moe_chunks: int = Field(1, ge=1)  # of a layer's tokens: exchanged while another is computed; bounds recompute
    token_dispatcher: str = "auto"  # how tokens reach their experts' ranks, dsmoe/moe/dispatch.py: a registered name
    moe_exchange_dtype: Literal["model", "bf16"] = "model"  # of rows between ranks; bf16 halves an fp32 model's traffic
    experts_implementation: Literal["auto", "grouped_mm", "transformer_engine", "native", "blocked", "loop"] = (
        "auto"  # which of dsmoe/moe/experts.py
    )
    fused_kernels: Literal["auto", True, False] = "auto"  # Triton's; auto: on GPUs in dsmoe/triton/verdicts.json

    # Keys that say how the model is computed or first made, not what it computes: a run may resume with others.
    RUNTIME_ONLY: ClassVar[frozenset[str]] = frozenset(
        [
            "experts_implementation",
            "fused_kernels",
            "init_std",
            "initialization",
            "moe_chunks",
            "moe_exchange_dtype",
            "recompute",
            "token_dispatcher",
        ]
    )

    def moe_layers(self) -> list[bool]:
        """For each layer, whether it is an MoE layer."""
        if isinstance(self.moe_layer_freq, list):
            return [bool(flag) for flag in self.moe_layer_freq]
        return [layer % self.moe_layer_freq == 0 for layer in range(self.num_layers)]

    def initialization_of(self, name: str) -> TensorInitialization | None:
        """The exception that applies to a tensor, by its canonical name."""
        return next((rule for rule in self.initialization if fnmatchcase(name, rule.tensors)), None)

    @property
    def dense_ffn_hidden_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.moe_ffn_hidden_size

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads


class RouterConfig(BaseModel):
    """Which router, and its own options: the plugin's `Options` class says which there are."""

    model_config = ConfigDict(extra="allow")

    name: str = "topk"  # of a router: dsmoe's own (docs/routers.md), or an installed plugin's

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ParallelConfig(Section):
    """How the processes share the work. Data parallelism is what remains: every process is a data rank."""

    expert_parallel: int = Field(1, ge=1)  # ranks that share one copy of the experts
    placement: Literal["auto", "within_node", "rank_order"] = (
        "auto"  # of these: inside a node where they fit; or refuse
    )
    zero_stage: Literal[1, 2, 3] = 1  # split over data ranks: 1 optimizer state, 2 gradients too, 3 weights too
    tensor_parallel: int = Field(1, ge=1)  # only 1
    pipeline_parallel: int = Field(1, ge=1)  # only 1
    context_parallel: int = Field(1, ge=1)  # only 1


class BlendPart(Section):
    """One of several datasets that are read as one."""

    path: UserPath  # as data.path
    weight: float = Field(gt=0)  # of its samples among all; weights need not sum to 1


class DataConfig(Section):
    """What is read: a folder made by dsmoe prepare-data, or any Megatron .bin/.idx prefix."""

    path: UserPath | list[BlendPart] = "data/corpus"  # a prepared folder, or PREFIX of .bin and .idx; list: a blend
    valid_path: UserPath | None = None  # held-out PREFIX, when `path` is a prefix; of a blend each holds out its own
    valid_fraction: float = Field(0.02, gt=0, lt=1)  # held out by document, for a prefix without `valid_path`
    tokenizer: UserPath | None = None  # SentencePiece model or tokenizer.json; None: the one in the dataset's folder
    cache_dir: UserPath | None = None  # where Megatron's sample indices are kept; None: beside the data


class TimeoutConfig(Section):
    """Seconds without progress after which a run of several ranks ends and says who is behind; 0: never."""

    start: float = Field(300.0, ge=0)  # from the command to the first step: imports, data, model, checkpoint
    step: float | None = Field(None, ge=0)  # of a step's phase; None: 10 times the median step, at least 60
    save: float = Field(1800.0, ge=0)  # while a checkpoint is written or read: a slow disk is no fault


class TrainingConfig(Section):
    """One optimizer step sees `global_batch_size` sequences, in `gradient_accumulation` parts, over all ranks."""

    steps: int = Field(100, ge=1)  # optimizer steps of the whole run, resumed parts included
    stop_at: int | None = Field(None, ge=1)  # save and stop after this step; schedules stay those of `steps`
    global_batch_size: int = Field(16, ge=1)  # sequences per optimizer step, over all ranks
    gradient_accumulation: int = Field(1, ge=1)  # micro-steps per optimizer step
    precision: Literal["fp32", "bf16"] = "fp32"  # routers, losses and optimizer state are fp32 in both
    tf32: bool = False  # on a GPU: fp32 products, routers' included, by tensor cores with operands rounded to 10 bits
    lr: float = Field(1e-3, gt=0)  # highest learning rate, after warm-up
    min_lr: float | None = Field(None, ge=0)  # at the last step; None: a tenth of lr
    warmup_steps: int = Field(10, ge=0)  # optimizer steps in which the rate rises from 0
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, a constant rate, then a decay
    decay_steps: int | None = Field(None, ge=0)  # of wsd; None: a fifth of steps
    decay_from: UserPath | None = None  # checkpoint (.../step_N) of a wsd run: continue it with a decay from N to steps
    weight_decay: float = Field(0.1, ge=0)  # on matrices; never on norms and biases
    decay_embeddings: bool = False  # whether weight decay also touches embedding and output matrices
    optimizer: str = "adamw"  # or lion, or an installed plugin's (dsmoe/optim)
    optimizer_options: dict[str, Any] = {}  # of another optimizer than adamw, whose options are the next three keys
    adam_beta1: float = Field(0.9, ge=0, lt=1)  # decay of the first moment in a step
    adam_beta2: float = Field(0.95, ge=0, lt=1)  # decay of the second moment in a step
    adam_eps: float = Field(1e-8, gt=0)  # added to the root of the second moment
    clip_grad: float = Field(1.0, ge=0)  # global gradient norm; 0: no clipping
    expert_lr: Literal["uniform", "load"] = "uniform"  # load: an expert's updates by the root of its share of routes
    revive_idle_experts: int = Field(0, ge=0)  # steps without a token before an expert begins anew; 0: never
    on_bad_step: Literal["stop", "skip"] = "stop"  # where loss or gradients are not finite; skip: pass its data over
    on_loss_spike: Literal["log", "skip"] = "log"  # a loss far above the recent ones (dsmoe/training/watch.py)
    max_skipped_steps: int = Field(10, ge=0)  # of a run; one more stops it
    eval_interval: int = Field(50, ge=0)  # optimizer steps between evaluations; 0: only at the end
    eval_sequences: int = Field(64, ge=1)  # held-out sequences per evaluation
    seed: int = Field(1234, ge=0)  # of initial weights and the order of samples
    timeout: TimeoutConfig = TimeoutConfig()
    resume: UserPath = "auto"  # auto: newest complete checkpoint of the run; never; PATH: a checkpoint or run
    resume_with: list[str] = []  # keys or sections whose change a checkpoint refuses: "data", "router", "training.seed"

    @property
    def final_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr


class CheckpointConfig(Section):
    """When a checkpoint is written and which ones stay."""

    interval: int = Field(100, ge=0)  # optimizer steps; 0: only at the end and on a signal
    keep_last: int = Field(2, ge=1)  # newest checkpoints that stay
    keep_every: int = Field(0, ge=0)  # also keep every checkpoint whose step is a multiple of this; 0: none
    background: bool = (
        True  # write beside training, from a copy in host memory (12 bytes per parameter of a rank with adamw)
    )


class LoggingConfig(Section):
    """Where a run leaves its traces."""

    run_dir: UserPath = "runs/run"  # folder of metrics, checkpoints and configuration
    interval: int = Field(1, ge=1)  # optimizer steps between lines of metrics.jsonl
    tensorboard: bool = True  # whether metrics go to TensorBoard, in run_dir/tensorboard
    layers: int = Field(10, ge=0)  # optimizer steps between values of single MoE layers in TensorBoard; 0: none
    pictures: int = Field(200, ge=0)  # optimizer steps between pictures of the experts' load there; 0: none, nor texts
    timings: bool = False  # also write, for each step, the seconds of its parts (rank 0)
    experts: int = Field(0, ge=0)  # optimizer steps between lines of experts.jsonl: routes and gradients; 0: none
    trace: int = Field(0, ge=0)  # optimizer steps between files that say which experts every token used; 0: none


SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "router": RouterConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
}


class RunConfig(Section):
    """All of a run: the seven typed sections, and `deepspeed`, which goes to DeepSpeed as it is."""

    model: ModelConfig = ModelConfig()
    router: RouterConfig = RouterConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    deepspeed: dict[str, Any] = {}

    def with_precision(self, gpu: bool) -> RunConfig:
        """With `training.precision` settled: bf16 on a GPU unless the user has said fp32. In fp32 torch's grouped GEMM
        is one call an expert there."""
        if "precision" in self.training.model_fields_set or not gpu:
            return self
        return self.model_copy(update={"training": self.training.model_copy(update={"precision": "bf16"})})

    def to_yaml(self) -> str:
        """The resolved configuration, loadable again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
