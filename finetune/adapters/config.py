"""What trains and how: the choices of stage 2 that decide which tensors move."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Method(Enum):
    """How weights change."""

    LORA = "lora"
    """Low-rank updates beside frozen weights, merged for release (arXiv 2106.09685)."""
    ADAPTER = "adapter"
    """Bottleneck adapters after attention and beside the MLP; not mergeable (arXiv 1902.00751, 2304.12620)."""
    FULL = "full"
    """Every weight of the scope that the loss reaches."""
    DORA = "dora"
    """LoRA with magnitude and direction apart (arXiv 2402.09353)."""
    RSLORA = "rslora"
    """LoRA scaled by 1/sqrt(r), for large ranks (arXiv 2312.03732)."""
    PISSA = "pissa"
    """LoRA that starts from the largest singular vectors of the weights (arXiv 2404.02948)."""
    EVA = "eva"
    """LoRA that starts from the main directions of the training slices' activations (arXiv 2410.07170)."""
    ADALORA = "adalora"
    """Ranks move to the layers that need them while training (arXiv 2303.10512)."""
    LOHA = "loha"
    """Hadamard product of two low-rank updates (arXiv 2108.06098)."""
    LOKR = "lokr"
    """Kronecker product of low-rank factors (arXiv 2212.10650)."""
    IA3 = "ia3"
    """One factor per output channel, no more (arXiv 2205.05638)."""
    VERA = "vera"
    """Fixed random projections shared by all layers, two trained vectors per layer (arXiv 2310.11454)."""
    HRA = "hra"
    """Householder reflections of the weights (arXiv 2405.17484)."""
    BOFT = "boft"
    """Block-orthogonal rotations of the weights (arXiv 2311.06243)."""
    SSF = "ssf"
    """Scale and shift of every output channel (arXiv 2210.08823)."""
    LN_TUNING = "ln_tuning"
    """Norm layers only (arXiv 2312.11420)."""
    BITFIT = "bitfit"
    """Biases only (arXiv 2106.10199)."""


LORA_FAMILY = frozenset({Method.LORA, Method.DORA, Method.RSLORA, Method.PISSA, Method.EVA})
QV_METHODS = frozenset({Method.LORA, Method.DORA, Method.RSLORA})
CONV_METHODS = frozenset({Method.LORA, Method.DORA, Method.RSLORA, Method.LOHA, Method.LOKR, Method.IA3, Method.HRA})
WHOLE_MODEL = frozenset({Method.FULL, Method.BITFIT})
"""Train SAM's own tensors: no peft wrapper, no adapter file, nothing to merge."""


class Scope(Enum):
    """Which parts of SAM change. The prompt encoder never does, except with ``heads: released``."""

    ENCODER_DECODER = "encoder_decoder"
    DECODER = "decoder"
    NECK_DECODER = "neck_decoder"
    """Decoder by the method, and the encoder's neck whole: the encoder's blocks need no gradient."""


class Targets(Enum):
    """Which layers get an update."""

    ALL_LINEAR = "all_linear"
    """qkv, proj and both MLP layers of every block; all projections and MLPs of the decoder."""
    QV = "qv"
    """Queries and values only, each with factors of its own, as in SAMed; keys are held at 0."""
    LINEAR_CONV = "linear_conv"
    """all_linear, the neck's convolutions and vit_t's pointwise ones. Depthwise ones cannot be merged by peft."""


class Heads(Enum):
    """What trains whole in decoder (and prompt encoder) beside what the method adds."""

    NEEDED = "needed"
    """Mask tokens, upscaling and the hypernetworks of the classes: what turns features into logits."""
    RELEASED = "released"
    """As the study's code: nothing with ``adapter``; with ``lora`` and ``full`` all of mask decoder's heads, the
    prompt encoder, and with ``lora`` vit_t's convolution stage, whether the loss reaches them or not."""


class BottleneckInit(Enum):
    """Start of bottleneck adapters."""

    ZERO = "zero"
    """Last layer 0: the first step starts from the pretrained model's own outputs."""
    RANDOM = "random"
    """nn.Linear's own, as the study's code: embeddings are off by a third to a half before the first step."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What trains and how."""

    method: Method = Method.LORA
    """METHOD= on the command line."""
    scope: Scope = Scope.ENCODER_DECODER
    """The study's best models tune both parts."""
    targets: Targets = Targets.ALL_LINEAR
    """all_linear needs fewer steps than qv at the same rank; its cost is the same, the update is merged."""
    blocks: list[int] = field(default_factory=list)
    """Encoder blocks that get an update, counted from 0 over the transformer blocks; empty is all."""
    last_blocks: int | None = None
    """Only this many encoder blocks next to the neck: below them nothing is saved for the backward pass, so time and
    memory fall. null is all."""
    heads: Heads = Heads.NEEDED
    """What else trains in the decoder."""
    r: int = 8
    """Rank of each update (LoRA family, adalora, loha, lokr, hra)."""
    lora_alpha: int = 8
    """Updates are scaled by lora_alpha / r; 1 as in SAMed (LoRA family, adalora, loha, lokr)."""
    lora_dropout: float = 0.0
    """Dropout on the input of the update (LoRA family)."""
    vera_r: int = 256
    """Rank of vera's shared projections; they do not train, so it is large (the paper's value)."""
    boft_block_size: int = 4
    """Side of boft's rotations; must divide the inputs of every layer."""
    bottleneck_ratio: float = 0.25
    """Hidden width of bottleneck adapters over the layer's own (the study's value)."""
    bottleneck_mlp_scale: float = 0.5
    """Weight of the adapter beside the MLP (the study's value)."""
    bottleneck_init: BottleneckInit = BottleneckInit.ZERO
    """Start of bottleneck adapters."""

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha < 1:
            raise ValueError(f"adapter.r and adapter.lora_alpha must be positive, got {self.r} and {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"adapter.lora_dropout must lie in [0, 1), got {self.lora_dropout}.")
        if self.vera_r < 1 or self.boft_block_size < 2:
            raise ValueError(
                f"adapter.vera_r must be positive and adapter.boft_block_size at least 2, got {self.vera_r} and "
                f"{self.boft_block_size}."
            )
        if not 0 < self.bottleneck_ratio <= 4 or self.bottleneck_mlp_scale <= 0:
            raise ValueError(
                "adapter.bottleneck_ratio must lie in (0, 4] and adapter.bottleneck_mlp_scale be positive, got "
                f"{self.bottleneck_ratio} and {self.bottleneck_mlp_scale}."
            )
        self._check_placement()
        self._check_combination()

    def _check_placement(self) -> None:
        if self.last_blocks is not None and self.last_blocks < 1:
            raise ValueError(f"adapter.last_blocks must be at least 1 or null, got {self.last_blocks}.")
        if any(index < 0 for index in self.blocks) or len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"adapter.blocks must be different numbers from 0 on, got {self.blocks}.")
        if self.blocks and self.last_blocks is not None:
            raise ValueError("adapter.blocks and adapter.last_blocks must not both be given: they say the same thing.")
        if self.scope is not Scope.ENCODER_DECODER and (self.blocks or self.last_blocks is not None):
            raise ValueError(
                f"adapter.blocks and adapter.last_blocks place updates in the encoder, whose blocks do not train with "
                f"adapter.scope={self.scope.value}. Use adapter.scope=encoder_decoder."
            )

    def _check_combination(self) -> None:
        reads_targets = self.method not in WHOLE_MODEL | {Method.ADAPTER, Method.LN_TUNING}
        if self.targets is Targets.QV and reads_targets and self.method not in QV_METHODS:
            raise ValueError(
                f"adapter.targets=qv must go with {_listed(QV_METHODS)}, got {self.method.value}: the encoder's qkv is "
                "one layer, and only their factors can be held apart. Use adapter.targets=all_linear."
            )
        if self.targets is Targets.LINEAR_CONV and reads_targets and self.method not in CONV_METHODS:
            raise ValueError(
                f"adapter.targets=linear_conv must go with {_listed(CONV_METHODS)}, got {self.method.value}. "
                "Use adapter.targets=all_linear."
            )
        if self.method is Method.HRA and self.r % 2:
            raise ValueError(f"adapter.r must be even for hra, got {self.r}: its reflections start in pairs.")
        released = {Method.LORA, Method.ADAPTER, Method.FULL}
        if self.heads is Heads.RELEASED and self.method not in released:
            raise ValueError(
                f"adapter.heads=released must go with {_listed(released)}, got {self.method.value}: the study had no "
                "other. Use adapter.heads=needed."
            )

    def unused_options(self) -> list[str]:
        """Return options that were changed from their default and that this method does not read."""
        default = AdapterConfig()
        users = {
            "targets": set(Method) - WHOLE_MODEL - {Method.ADAPTER, Method.LN_TUNING},
            "r": LORA_FAMILY | {Method.ADALORA, Method.LOHA, Method.LOKR, Method.HRA},
            "lora_alpha": LORA_FAMILY | {Method.ADALORA, Method.LOHA, Method.LOKR},
            "lora_dropout": LORA_FAMILY,
            "vera_r": {Method.VERA},
            "boft_block_size": {Method.BOFT},
            "bottleneck_ratio": {Method.ADAPTER},
            "bottleneck_mlp_scale": {Method.ADAPTER},
            "bottleneck_init": {Method.ADAPTER},
        }
        return [
            name
            for name, methods in users.items()
            if self.method not in methods and getattr(self, name) != getattr(default, name)
        ]


def _listed(methods: frozenset[Method] | set[Method]) -> str:
    return ", ".join(method.value for method in Method if method in methods)
