"""Fine-tuning methods, one record each, and the settings that choose between them.

A new method is one entry of ``METHODS``. Its ``build`` function returns a configuration of peft; a tuner that peft does
not have is registered with ``layers.register_tuner`` first. Everything else (the command line, the checks of settings,
placement, saving, merging, the report) reads the record.

peft imports transformers, which takes seconds, so the builders import it when an adapter is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any

import pydantic.dataclasses
from annotated_types import Ge, Gt, Le
from samgraft.finetune.adapters.choices import BottleneckInit, Heads, Placement, Targets, TuningScope
from samgraft.shared.config import NonNegativeInt, Positive, PositiveInt, ShareBelowOne
from samgraft.shared.errors import UsageError

if TYPE_CHECKING:
    from peft import PeftConfig

ADALORA_START = 1.5
"""Initial rank of adalora as a multiple of the final one (12 to 8 in the paper's code)."""
ADALORA_WARMUP = 0.1
"""Share of the steps before ranks change."""
ADALORA_FINAL = 0.4
"""Share of the steps at the end, during which ranks are fixed."""
ADALORA_MIN_STEPS = 10

LayerSizes = Mapping[str, tuple[int, int]]
"""Numbers of inputs and outputs of the targeted layers, by module name."""


@dataclass(frozen=True, kw_only=True)
class AdapterRequest:
    """Inputs from which a method builds its peft configuration."""

    config: AdapterConfig
    places: Mapping[str, Any]
    """Options of every peft configuration.

    ``target_modules`` is the full regular expression of the modules that get an update, ``modules_to_save`` lists those
    that train whole."""
    parallel_modules: str
    """Full regular expression of the modules whose bottleneck adapter is parallel to them."""
    max_steps: int | None
    """Length of the run in optimizer steps, None outside a run."""


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """Properties of one fine-tuning method."""

    build: Callable[[AdapterRequest], PeftConfig] | None = None
    """Function that returns the peft configuration. None trains SAM's own tensors, and there is then no
    peft wrapper, no adapter file and nothing to merge."""
    placement: Placement = Placement.LAYERS
    """Modules that get an update. Not read without ``build``."""
    options: frozenset[str] = frozenset()
    """Fields of ``AdapterConfig`` that this method reads and others ignore. ``targets`` follows from ``placement``."""
    check_layers: Callable[[AdapterConfig, LayerSizes], None] | None = None
    """Function that refuses settings which do not fit the targeted layers."""
    rank_multiple: int = 1
    """Divisor of every valid rank."""
    supports_qv: bool = False
    """True when queries and values of a fused qkv layer can have separate factors."""
    supports_convolutions: bool = False
    is_mergeable: bool = True
    """True when the result can be written as plain SAM weights."""
    trains_released_heads: bool | None = None
    """True when the study's code trained the heads with this method, None when the study did not use the method."""
    biases_only: bool = False
    """True when only biases of SAM's own tensors train, besides the heads (bitfit)."""
    uses_training_slices: bool = False
    """True when the initial factors come from activations on training slices (eva)."""
    changes_base: bool = False
    """True when the initial factors are subtracted from the base weights (pissa)."""

    def reads(self, option: str) -> bool:
        """Return True when this method reads a field of ``AdapterConfig`` that other methods may ignore."""
        if option == "targets":
            return self.build is not None and self.placement is Placement.LAYERS
        return option in self.options


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Method, its options and the modules that train."""

    method: str = "lora"
    """Name in ``METHODS``. METHOD= on the command line."""
    scope: TuningScope = TuningScope.ENCODER_DECODER
    """Parts of SAM that change. The study's best models tune both."""
    targets: Targets = Targets.ALL_LINEAR
    """Layers that get an update. all_linear needs fewer steps than qv at equal rank and cost, and is merged too."""
    blocks: list[NonNegativeInt] = field(default_factory=list)
    """Encoder blocks that get an update, counted from 0 over the transformer blocks. Empty takes all."""
    last_blocks: PositiveInt | None = None
    """Number of encoder blocks next to the neck that get an update. null takes all. Blocks below them keep nothing for
    the backward pass, so time and memory fall."""
    heads: Heads = Heads.NEEDED
    """Modules that train whole in the decoder."""
    r: PositiveInt = 8
    """Rank of each update (LoRA family, adalora, loha, lokr, hra)."""
    lora_alpha: PositiveInt = 8
    """Numerator of the update's scale lora_alpha / r, which is 1 as in SAMed (LoRA family, adalora, loha, lokr)."""
    lora_dropout: ShareBelowOne = 0.0
    """Dropout probability on the input of the update (LoRA family)."""
    vera_r: PositiveInt = 256
    """Rank of vera's shared projections. They do not train, so it is large (the paper's value)."""
    boft_block_size: Annotated[int, Ge(2)] = 4
    """Side of boft's rotations. Must divide the inputs of every layer."""
    bottleneck_ratio: Annotated[float, Gt(0), Le(4)] = 0.25
    """Hidden width of bottleneck adapters relative to the layer's width (the study's value)."""
    bottleneck_mlp_scale: Positive = 0.5
    """Weight of the adapter that is parallel to the MLP (the study's value)."""
    bottleneck_init: BottleneckInit = BottleneckInit.ZERO
    """Initial weights of bottleneck adapters."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", self.method.lower())
        if self.method not in METHODS:
            close = get_close_matches(self.method, METHODS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"adapter.method must be one of {', '.join(METHODS)}, got {self.method!r}.{hint}")
        self._check_placement()
        self._check_combination()

    @property
    def spec(self) -> MethodSpec:
        """Record of the method."""
        return METHODS[self.method]

    def _check_placement(self) -> None:
        if len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"adapter.blocks must be different numbers, got {self.blocks}.")
        if self.blocks and self.last_blocks is not None:
            raise ValueError("adapter.blocks and adapter.last_blocks must not both be given. Remove one of them.")
        if self.scope is not TuningScope.ENCODER_DECODER and (self.blocks or self.last_blocks is not None):
            raise ValueError(
                f"adapter.blocks and adapter.last_blocks choose encoder blocks, which do not train with "
                f"adapter.scope={self.scope.value}. Use adapter.scope=encoder_decoder."
            )

    def _check_combination(self) -> None:
        spec = self.spec
        if self.targets is Targets.QV and spec.reads("targets") and not spec.supports_qv:
            raise ValueError(
                f"adapter.targets=qv needs one of {_methods_where(lambda m: m.supports_qv)}, got "
                f"{self.method}: the encoder's qkv is one layer, and only their factors can be kept apart. "
                "Use adapter.targets=all_linear."
            )
        if self.targets is Targets.LINEAR_CONV and spec.reads("targets") and not spec.supports_convolutions:
            raise ValueError(
                f"adapter.targets=linear_conv needs one of "
                f"{_methods_where(lambda m: m.supports_convolutions)}, got {self.method}. "
                "Use adapter.targets=all_linear."
            )
        if spec.reads("r") and self.r % spec.rank_multiple:
            raise ValueError(f"adapter.r must be a multiple of {spec.rank_multiple} for {self.method}, got {self.r}.")
        if self.heads is Heads.RELEASED and spec.trains_released_heads is None:
            raise ValueError(
                f"adapter.heads=released needs one of "
                f"{_methods_where(lambda m: m.trains_released_heads is not None)}, the study's methods, "
                f"got {self.method}. Use adapter.heads=needed."
            )

    def describe(self) -> str:
        """Return method and scope, and the rank of methods that have one."""
        rank = [f"rank {self.r}"] if self.spec.reads("r") else []
        return ", ".join([self.method, self.scope.value, *rank])

    def unused_options(self) -> list[str]:
        """Return options that were changed from their default and that this method does not read."""
        default = AdapterConfig()
        return [
            option.name
            for option in dataclasses.fields(self)
            if any(method.reads(option.name) for method in METHODS.values())
            and not self.spec.reads(option.name)
            and getattr(self, option.name) != getattr(default, option.name)
        ]


def _lora(init: str | bool = True, **variant: bool) -> Callable[[AdapterRequest], PeftConfig]:
    """Return the builder of a LoRA variant. ``variant`` holds peft's switches such as ``use_dora``."""

    def build(request: AdapterRequest) -> PeftConfig:
        import peft

        config = request.config
        options: dict[str, Any] = {**request.places, **variant, "init_lora_weights": init}
        if config.targets is Targets.QV and config.scope is TuningScope.ENCODER_DECODER:
            # The encoder's qkv is one layer. Rank 2r gives r to the queries and r to the values, see separate_qv. The
            # larger alpha keeps the scale of a rank-r update: alpha / r, or alpha / sqrt(r) with rslora.
            alpha = config.lora_alpha * (math.sqrt(2) if variant.get("use_rslora") else 2)
            options |= {"rank_pattern": {r"attn\.qkv": 2 * config.r}, "alpha_pattern": {r"attn\.qkv": alpha}}
        if init == "eva":
            # rho 1 keeps the rank of every layer, so that a file of this method has the shape of a plain LoRA's.
            options["eva_config"] = peft.EvaConfig(rho=1.0, use_label_mask=False)
        return peft.LoraConfig(r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, **options)

    return build


def _adalora(request: AdapterRequest) -> PeftConfig:
    import peft

    config, steps = request.config, request.max_steps
    if steps is None:
        raise UsageError("adapter.method=adalora needs trainer.max_steps, because it plans its ranks by them.")
    if steps < ADALORA_MIN_STEPS:
        raise UsageError(
            f"trainer.max_steps must be at least {ADALORA_MIN_STEPS} for adapter.method=adalora, got {steps}: its "
            "ranks change between 10 % and 60 % of the run.",
            where="trainer.max_steps",
        )
    return peft.AdaLoraConfig(
        **request.places,
        init_r=max(config.r + 1, round(ADALORA_START * config.r)),
        target_r=config.r,
        lora_alpha=config.lora_alpha,
        tinit=round(ADALORA_WARMUP * steps),
        tfinal=round(ADALORA_FINAL * steps),
        deltaT=max(1, steps // 100),
        total_step=steps,
    )


def _peft(kind: str, options: Callable[[AdapterConfig], dict[str, Any]]) -> Callable[[AdapterRequest], PeftConfig]:
    """Return the builder of a method of peft, from the name of its configuration class and its options."""

    def build(request: AdapterRequest) -> PeftConfig:
        import peft

        made: PeftConfig = getattr(peft, kind)(**request.places, **options(request.config))
        return made

    return build


def _rank_and_alpha(config: AdapterConfig) -> dict[str, Any]:
    return {"r": config.r, "alpha": config.lora_alpha}


def _boft(config: AdapterConfig) -> dict[str, Any]:
    return {"boft_block_size": config.boft_block_size, "boft_n_butterfly_factor": 1, "bias": "none"}


def _ssf(request: AdapterRequest) -> PeftConfig:
    from samgraft.finetune.adapters.layers import ScaleShiftConfig

    return ScaleShiftConfig(**request.places)


def _bottleneck(request: AdapterRequest) -> PeftConfig:
    from samgraft.finetune.adapters.layers import BottleneckConfig

    config = request.config
    return BottleneckConfig(
        **request.places,
        parallel_modules=request.parallel_modules,
        ratio=config.bottleneck_ratio,
        parallel_scale=config.bottleneck_mlp_scale,
        init_zero=config.bottleneck_init is BottleneckInit.ZERO,
    )


def _check_rank(config: AdapterConfig, sizes: LayerSizes) -> None:
    """Refuse a rank above the smaller side of a layer."""
    name, smallest = min(((n, min(shape)) for n, shape in sizes.items()), key=lambda item: item[1])
    if config.r > smallest:
        raise UsageError(
            f"adapter.r must be at most {smallest}, the smaller side of {name}, got {config.r}. A larger rank is a "
            "full update: use a smaller one, or adapter.method=full.",
            where="adapter.r",
        )


def _check_boft_blocks(config: AdapterConfig, sizes: LayerSizes) -> None:
    """Refuse rotations that do not divide the inputs of a layer."""
    size = config.boft_block_size
    if odd := [f"{name} ({shape[0]})" for name, shape in sizes.items() if shape[0] % size]:
        raise UsageError(
            f"adapter.boft_block_size must divide the inputs of every layer, {size} does not divide those of "
            f"{len(odd)}, e.g. {odd[0]}. Use 2 or 4.",
            where="adapter.boft_block_size",
        )


_LORA_OPTIONS = frozenset({"r", "lora_alpha", "lora_dropout"})

METHODS: dict[str, MethodSpec] = {
    # Low-rank updates of frozen weights, merged for release. arXiv 2106.09685
    "lora": MethodSpec(
        build=_lora(),
        options=_LORA_OPTIONS,
        check_layers=_check_rank,
        supports_qv=True,
        supports_convolutions=True,
        trains_released_heads=True,
    ),
    # Bottleneck adapters after attention and in parallel to the MLP. arXiv 1902.00751, 2304.12620
    "adapter": MethodSpec(
        build=_bottleneck,
        placement=Placement.SUBLAYERS,
        options=frozenset({"bottleneck_ratio", "bottleneck_mlp_scale", "bottleneck_init"}),
        is_mergeable=False,
        trains_released_heads=False,
    ),
    # All weights of the scope that the loss reaches.
    "full": MethodSpec(trains_released_heads=True),
    # LoRA with separate magnitude and direction. arXiv 2402.09353
    "dora": MethodSpec(
        build=_lora(use_dora=True),
        options=_LORA_OPTIONS,
        check_layers=_check_rank,
        supports_qv=True,
        supports_convolutions=True,
    ),
    # LoRA scaled by 1/sqrt(r), for large ranks. arXiv 2312.03732
    "rslora": MethodSpec(
        build=_lora(use_rslora=True),
        options=_LORA_OPTIONS,
        check_layers=_check_rank,
        supports_qv=True,
        supports_convolutions=True,
    ),
    # LoRA that starts from the largest singular vectors of the weights. arXiv 2404.02948
    "pissa": MethodSpec(build=_lora("pissa"), options=_LORA_OPTIONS, check_layers=_check_rank, changes_base=True),
    # LoRA that starts from the main directions of the training slices' activations. arXiv 2410.07170
    "eva": MethodSpec(build=_lora("eva"), options=_LORA_OPTIONS, check_layers=_check_rank, uses_training_slices=True),
    # Ranks that are moved during training to the layers that need them. arXiv 2303.10512
    "adalora": MethodSpec(build=_adalora, options=frozenset({"r", "lora_alpha"}), check_layers=_check_rank),
    # Hadamard product of two low-rank updates. arXiv 2108.06098
    "loha": MethodSpec(
        build=_peft("LoHaConfig", _rank_and_alpha),
        options=frozenset({"r", "lora_alpha"}),
        supports_convolutions=True,
    ),
    # Kronecker product of low-rank factors. arXiv 2212.10650
    "lokr": MethodSpec(
        build=_peft("LoKrConfig", _rank_and_alpha),
        options=frozenset({"r", "lora_alpha"}),
        supports_convolutions=True,
    ),
    # One factor per output channel. arXiv 2205.05638
    "ia3": MethodSpec(build=_peft("IA3Config", lambda config: {"feedforward_modules": []}), supports_convolutions=True),
    # Fixed random projections shared by all layers, two trained vectors per layer. arXiv 2310.11454
    "vera": MethodSpec(build=_peft("VeraConfig", lambda config: {"r": config.vera_r}), options=frozenset({"vera_r"})),
    # Householder reflections of the weights, which start in pairs. arXiv 2405.17484
    "hra": MethodSpec(
        build=_peft("HRAConfig", lambda config: {"r": config.r}),
        options=frozenset({"r"}),
        check_layers=_check_rank,
        rank_multiple=2,
        supports_convolutions=True,
    ),
    # Block-orthogonal rotations of the weights. arXiv 2311.06243
    "boft": MethodSpec(
        build=_peft("BOFTConfig", _boft),
        options=frozenset({"boft_block_size"}),
        check_layers=_check_boft_blocks,
    ),
    # Scale and shift of every output channel. arXiv 2210.08823
    "ssf": MethodSpec(build=_ssf),
    # Norm layers only. arXiv 2312.11420
    "ln_tuning": MethodSpec(build=_peft("LNTuningConfig", lambda config: {}), placement=Placement.NORMS),
    # Biases only. arXiv 2106.10199
    "bitfit": MethodSpec(biases_only=True),
}
"""All methods, by the value of ``adapter.method``."""


def _methods_where(condition: Callable[[MethodSpec], bool]) -> str:
    return ", ".join(name for name, method in METHODS.items() if condition(method))
