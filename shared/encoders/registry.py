"""Registry of encoder families, and shapes by name or from a file's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samgraft.shared.encoders.base import EncoderSpec
from samgraft.shared.encoders.hiera import HieraSpec
from samgraft.shared.encoders.tiny_vit import TinyViTSpec
from samgraft.shared.encoders.vit import ViTSpec
from samgraft.shared.errors import UsageError, WeightsError
from torch import Tensor

FAMILIES: tuple[type[EncoderSpec], ...] = (
    TinyViTSpec,
    ViTSpec,
    HieraSpec,
)
"""Encoder families. A new one is a file in this folder and a line here, before any family whose anchors it also has."""

DEFAULT_ARCH = "vit_t"
"""Architecture when none is given. Its base weights are part of the demo data."""

ENCODER_PREFIX = "image_encoder."


def published_specs() -> list[EncoderSpec]:
    """Return the published shapes of all families."""
    return [spec for family in FAMILIES for spec in family.published()]


def arch_names() -> list[str]:
    """Return the names of all architectures, in the order of the registry."""
    return list(dict.fromkeys(spec.arch for spec in published_specs()))


def arch_spec(arch: EncoderSpec | str, variant: str | None = None) -> EncoderSpec:
    """Return the published shape of an architecture. An ``EncoderSpec`` is returned as it is.

    Args:
        arch: Name of the architecture, or a shape.
        variant: Variant within the architecture (the stem of vit_t); default the first published one.

    Raises:
        UsageError: If there is no such architecture or no such variant.
    """
    if isinstance(arch, EncoderSpec):
        return arch
    shapes = [spec for spec in published_specs() if spec.arch == arch]
    if not shapes:
        raise UsageError(f"model must be one of {', '.join(arch_names())}, got {arch!r}.")
    if variant is None:
        return shapes[0]
    for spec in shapes:
        if spec.variant == variant:
            return spec
    known = ", ".join(spec.variant for spec in shapes if spec.variant)
    raise UsageError(f"stem must be {f'one of {known}' if known else 'left out'} for {arch}, got {str(variant)!r}.")


def spec_from_tensors(tensors: Mapping[str, Tensor]) -> EncoderSpec:
    """Read an encoder's shape from tensors named as in segment_anything (``image_encoder.*``).

    Raises:
        WeightsError: If there is no encoder among them, or its tensors are incomplete.
    """
    encoder = _encoder_tensors(tensors)
    for family in FAMILIES:
        if family.recognises(encoder):
            try:
                return family.from_tensors(encoder)
            except KeyError as err:
                raise WeightsError(
                    f"the image encoder must be complete, {ENCODER_PREFIX}{err.args[0]} is missing. It is of the "
                    f"family of {family.published()[0].arch}; use a file with all tensors of the model."
                ) from err
            except IndexError as err:
                raise WeightsError("image encoder has tensors with too few dimensions. The file is damaged.") from err
    anchors = " or ".join(f"{ENCODER_PREFIX}{family.anchors[0]}" for family in FAMILIES)
    raise WeightsError(f"weights contain no image encoder of a known family (expected a tensor {anchors}).")


def image_size_from_tensors(tensors: Mapping[str, Tensor], spec: EncoderSpec) -> int:
    """Return the input side in pixels that an encoder's tensors (``image_encoder.*``) were made for."""
    return spec.image_size_of(_encoder_tensors(tensors))


def encoder_anchors() -> list[str]:
    """Return the tensors by which encoders are found in a file, the most specific of each family first."""
    columns = [family.anchors for family in FAMILIES]
    rows = [[anchors[i] for anchors in columns if i < len(anchors)] for i in range(max(map(len, columns)))]
    # Names are compared by their ends, so a name that ends with another one must be tried first.
    return list(dict.fromkeys(anchor for row in rows for anchor in sorted(row, key=len, reverse=True)))


def spec_from_dict(values: Mapping[str, Any]) -> EncoderSpec:
    """Read a shape that ``EncoderSpec.to_dict`` wrote, in this or an earlier version.

    Raises:
        WeightsError: If the family is not known here.
    """
    for family in FAMILIES:
        shape = values.get(family.family)
        if shape is not None:
            mean, std = values["pixel_mean"], values["pixel_std"]
            return family(
                arch=values["arch"],
                native_image_size=values["native_image_size"],
                neck_dim=values["neck_dim"],
                pixel_mean=(mean[0], mean[1], mean[2]),
                pixel_std=(std[0], std[1], std[2]),
                **{name: tuple(v) if isinstance(v, list) else v for name, v in shape.items()},
            )
    known = ", ".join(family.family for family in FAMILIES)
    raise WeightsError(f"stored encoder shape is of an unknown family (expected one of {known}). Update samgraft.")


def _encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(ENCODER_PREFIX): v for k, v in tensors.items() if k.startswith(ENCODER_PREFIX)}
