"""Values of the adapter settings that are chosen from a list."""

from __future__ import annotations

from enum import Enum


class TuningScope(Enum):
    """Parts of SAM that change. The prompt encoder never does, except with ``heads=released``."""

    ENCODER_DECODER = "encoder_decoder"
    DECODER = "decoder"
    NECK_DECODER = "neck_decoder"
    """Decoder by the method and the whole encoder neck. The encoder's blocks need no gradient."""


class Targets(Enum):
    """Layers that get an update."""

    ALL_LINEAR = "all_linear"
    """qkv, proj and both MLP layers of every block, all projections and MLPs of the decoder."""
    QV = "qv"
    """Queries and values only, each with its own factors, as in SAMed. The update of the keys stays 0."""
    LINEAR_CONV = "linear_conv"
    """all_linear, the neck's convolutions and vit_t's pointwise ones. peft cannot merge depthwise convolutions."""


class Heads(Enum):
    """Modules that train whole in the decoder and prompt encoder, in addition to the method's own tensors."""

    NEEDED = "needed"
    """Mask tokens, upscaling and the hypernetworks of the classes, which turn features into logits."""
    RELEASED = "released"
    """Modules that the study's code trains. None with ``adapter``. With ``lora`` and ``full`` all heads of the mask
    decoder and the prompt encoder, and with ``lora`` vit_t's convolution stage, even where the loss does not reach
    them."""


class BottleneckInit(Enum):
    """Initial weights of bottleneck adapters."""

    ZERO = "zero"
    """Zeros in the last layer. The first step starts from the outputs of the pretrained model."""
    RANDOM = "random"
    """Default of nn.Linear, as in the study's code. Embeddings differ by a third to a half before the first step."""


class Placement(Enum):
    """Modules that a method changes."""

    LAYERS = "layers"
    """Linear layers and convolutions chosen by ``adapter.targets``."""
    NORMS = "norms"
    """Norm layers."""
    SUBLAYERS = "sublayers"
    """Attention and MLP modules as a whole."""
