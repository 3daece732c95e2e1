"""A new encoder family, added by one file and one line of the registry, goes through both stages and a release."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from model_factory import make_sam
from release_factory import InThisProcess
from samgraft.finetune.release import release_clients
from samgraft.shared.cli import main
from samgraft.shared.encoders import registry
from samgraft.shared.encoders.base import EncoderSpec, ImageEncoder, LayerNames, build_neck, upsample_token_mask
from samgraft.shared.encoders.registry import arch_names, arch_spec, spec_from_dict
from samgraft.shared.files import write_tensors
from samgraft.shared.release import load_back
from samgraft.shared.release.formats import TRANSFORMERS_FORMAT
from samgraft.shared.release.onnx_format import ONNX_FORMAT
from samgraft.shared.release.subject import Subject
from samgraft.shared.weights.load import read_weights
from store_factory import make_store
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
SIZE = 32


@dataclass(frozen=True, kw_only=True)
class ToySpec(EncoderSpec):
    """Shape of a transformer of one width, with patches of 8 px and no positions."""

    dim: int = 16
    depth: int = 2

    family: ClassVar[str] = "toy"
    anchors: ClassVar[tuple[str, ...]] = ("trunk.0.mixer.qkv.weight",)
    layers: ClassVar[LayerNames] = LayerNames(
        linear=r"(mixer\.(qkv|out)|mlp\.[02])", norms="norm", qkv=r"mixer\.qkv", attention="mixer"
    )
    default_objective: ClassVar[str] = "masked_image"
    release_formats: ClassVar[frozenset[str]] = frozenset({"sam"})

    @classmethod
    def published(cls) -> tuple["ToySpec", ...]:
        return (cls(arch="toy_16", native_image_size=SIZE, neck_dim=16),)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ToySpec":
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("trunk."))
        dim, neck_dim = tensors["stem.weight"].shape[0], tensors["neck.0.weight"].shape[0]
        return cls(arch="toy_16", native_image_size=SIZE, dim=dim, depth=depth, neck_dim=neck_dim)

    def build(self, *, image_size: int) -> "ToyEncoder":
        return ToyEncoder(self, image_size=image_size)

    @property
    def stride(self) -> int:
        return 8

    @property
    def feature_dim(self) -> int:
        return self.dim

    @property
    def mask_token_dim(self) -> int:
        return self.dim

    @property
    def crop_unit(self) -> int:
        return 1

    @property
    def title(self) -> str:
        return f"Toy ({self.dim}x{self.depth})"

    def block_names(self) -> list[str]:
        return [f"trunk.{index}" for index in range(self.depth)]


class ToyMixer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(tokens_BNC).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class ToyBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mixer = ToyMixer(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        tokens_BNC = tokens_BNC + self.mixer(self.norm(tokens_BNC))
        return tokens_BNC + self.mlp(tokens_BNC)


class ToyEncoder(ImageEncoder):
    def __init__(self, spec: ToySpec, *, image_size: int) -> None:
        super().__init__(spec, image_size=image_size)
        self.stem = nn.Conv2d(3, spec.dim, kernel_size=8, stride=8)
        self.trunk = nn.ModuleList(ToyBlock(spec.dim) for _ in range(spec.depth))
        self.neck = build_neck(spec.dim, spec.neck_dim)

    def forward_features(
        self, images_B3SS: Tensor, *, token_mask_Bhw: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        features_BChw = self.stem(images_B3SS)
        if token_mask_Bhw is not None:
            hidden = upsample_token_mask(token_mask_Bhw, side=features_BChw.shape[-1], name="token grid")[:, None]
            token = features_BChw.new_zeros(self.mask_token_dim) if mask_token is None else mask_token
            features_BChw = torch.where(hidden, token.view(1, -1, 1, 1), features_BChw)
        tokens_BNC = features_BChw.flatten(2).mT
        for block in self.trunk:
            tokens_BNC = self.run_unit(block, tokens_BNC)
        return tokens_BNC.mT.reshape(features_BChw.shape)

    def layer_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        yield 0, list(self.stem.parameters())
        for index, block in enumerate(self.trunk):
            yield index + 1, list(block.parameters())
        yield len(self.trunk) + 1, list(self.neck.parameters())

    def units(self) -> Iterator[nn.Module]:
        yield from self.trunk


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToySpec:
    """Add the line ``ToySpec,`` to the registry and nothing else."""
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, ToySpec))
    return ToySpec.published()[0]


def test_new_encoder__goes_through_both_stages_and_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], toy: ToySpec
) -> None:
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "unlabelled", num_patients=4, shape_zyx=(3, 24, 20), labelled=False)
    make_store(tmp_path / "labelled", num_patients=5, shape_zyx=(3, 24, 20))
    write_tensors(tmp_path / "base.safetensors", dict(make_sam(toy, image_size=SIZE).state_dict()))
    size, steps = [f"model.image_size={SIZE}", "data.batch_size=2", "optim.warmup_steps=1"], "trainer.max_steps=3"

    settings = [*size, steps, "watch.every_n_steps=2", "watch.num_panel_rows=2", "data.num_held_out_slices=2"]
    settings += ["model.scope.kind=lora", "model.num_frozen_depths=0"]
    arguments = ["--data", "unlabelled/store.zarr", "--base", "base.safetensors", "--name", "ssl"]
    assert main(["pretrain", *arguments, *settings]) == 0
    card = json.loads(Path("runs/ssl/encoder/card.json").read_text())
    assert (card["arch"], card["objective"], card["image_size"]) == ("toy_16", "masked_image", SIZE)

    arguments = ["--ckpt", "runs/ssl", "--base", "base.safetensors", "--data", "labelled/store.zarr", "--name", "seg"]
    settings = [*size, steps, "watch.validate_every_n_steps=2", "watch.num_overlays=1", "adapter.r=2"]
    settings.append("data.allow_transductive=true")  # both stores are made of the same patients
    assert main(["finetune", *arguments, *settings]) == 0

    monkeypatch.setattr(load_back.subprocess, "run", InThisProcess(capsys, release_clients.CLIENTS).run)
    assert (
        main(["release", "runs/seg", "--out", "released", "--license", "cc-by-4.0", "--format", "sam", "--force"]) == 0
    )
    released, base = read_weights(Path("released/sam.safetensors")), read_weights(Path("base.safetensors"))
    assert released.spec.has_shape_of(toy)
    assert released.tensors.keys() == base.tensors.keys()
    changed = {name for name, tensor in released.tensors.items() if not torch.equal(tensor, base.tensors[name])}
    for layer in ("mixer.qkv", "mixer.out", "mlp.0", "mlp.2"):
        assert f"image_encoder.trunk.0.{layer}.weight" in changed


def test_new_encoder__other_formats_are_left_out_with_a_reason(toy: ToySpec) -> None:
    subject = Subject(tensors=make_sam(toy, image_size=SIZE).state_dict(), spec=toy, image_size=SIZE)
    assert "cannot express toy_16" in str(TRANSFORMERS_FORMAT.why_not(subject))
    assert "toy_16 cannot be exported to ONNX" in str(ONNX_FORMAT.why_not(subject))
    assert subject.why_not_stock == "it has no entry for toy_16"


def test_new_encoder__is_listed_and_read_back_from_a_stored_shape(toy: ToySpec) -> None:
    assert "toy_16" in arch_names()
    assert arch_spec("toy_16") == toy
    assert spec_from_dict(json.loads(json.dumps(toy.to_dict()))) == toy


FAMILY_TEST = re.compile(
    r"\.(plain|tiny)\b|\b(ViT|TinyViT|Hiera)(Spec|Encoder)\b|encoders\.(vit|tiny_vit|hiera)\b"
    r"|[=!]= *[\"'](vit_|sam2_|plain|tiny|hiera)"
)
"""Classes, modules and names of families, which code outside must not mention."""


def test_source__outside_encoders_and_weights_no_code_tests_for_a_family() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("shared", "ssl", "finetune")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not path.is_relative_to(ROOT / "shared/encoders") and not path.is_relative_to(ROOT / "shared/weights")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FAMILY_TEST.search(line)
    ]
    assert found == []
