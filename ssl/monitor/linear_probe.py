"""Linear probe, the Dice of a linear head on the frozen features.

The head is fitted in closed form on the features before the neck, which every objective trains. It is a ridge
regression of the share of each class in a token's cell, followed per class by the threshold with the best Dice on the
training tokens. Nothing is random, so that two rounds with the same weights give the same value. It is scored by
foreground Dice on slices of other patients at their native size. The value before training is the reference.

A nearest-neighbour probe is not used, because masked autoencoders have low values there and segment well.

Shape letters: N = slices, S = side of the input, C = channels of the features, K = foreground classes, T = tokens,
h, w = token rows and columns, H, W = rows and columns of a slice.

Source: Hoerl and Kennard, Ridge regression (Technometrics 1970). He et al., Masked Autoencoders (CVPR 2022), section
4.3: linear separability and transfer of MAE's features do not go together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.base import ImageEncoder
from samgraft.shared.encoders.sam import to_pixels
from samgraft.shared.samples.frame import InputFrame, label_to_frame, logits_to_native
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.ssl.monitor.labelled import LabelledSlices, ProbeData
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Linear map from features to scores, which are positive where the class is predicted."""

    weight_KC: Tensor
    bias_K: Tensor

    def scores(self, features_NChw: Tensor) -> Tensor:
        """Return scores (N, K, h, w)."""
        return F.conv2d(features_NChw.float(), self.weight_KC[:, :, None, None], self.bias_K)


@torch.no_grad()
def encode(encoder: ImageEncoder, images_N1SS: Tensor, *, batch_size: int, device: torch.device) -> list[Tensor]:
    """Return the features before the neck of every slice, in batches (B, C, h, w) on the device."""
    return [
        encoder.forward_features(to_pixels(images_N1SS[i : i + batch_size].to(device), encoder.spec))
        for i in range(0, len(images_N1SS), batch_size)
    ]


def class_shares(slices: LabelledSlices, class_ids: Sequence[int], *, stride: int) -> tuple[Tensor, Tensor]:
    """Return the share of each class in every token's cell, and the tokens with pixels of the slice.

    Returns:
        Shares (N, K, h, w) in [0, 1], and a boolean mask (N, h, w) that is False in the padding and for tokens with a
        pixel that is not annotated.
    """
    shares, inside = [], []
    for label_HW, frame in zip(slices.labels, slices.frames, strict=True):
        label_SS = label_to_frame(label_HW[None], frame)[0]
        one_hot_KSS = torch.stack([(label_SS == i).float() for i in class_ids])
        shares.append(F.avg_pool2d(one_hot_KSS, stride))
        grid = frame.image_size // stride
        rows, columns = (-(-side // stride) for side in frame.content_hw)
        ignored_hw = F.max_pool2d((label_SS == IGNORE_LABEL).float()[None], stride)[0] > 0
        inside.append((torch.arange(grid)[:, None] < rows) & (torch.arange(grid)[None, :] < columns) & ~ignored_hw)
    return torch.stack(shares), torch.stack(inside)


def fit_head(features_TC: Tensor, shares_TK: Tensor, *, ridge: float) -> LinearHead:
    """Fit the head in closed form.

    Args:
        features_TC: Feature vector of each token.
        shares_TK: Share of each class in the token's cell, in [0, 1].
        ridge: Weight of the penalty, as a share of the features' variance.
    """
    mean_C, std_C = features_TC.mean(0), features_TC.std(0, correction=0)
    # A constant channel contains no information; its weight becomes 0.
    scale_C = torch.where(std_C > 0, 1 / std_C.clamp_min(1e-30), torch.zeros_like(std_C))
    scaled_TC = (features_TC - mean_C) * scale_C
    share_K = shares_TK.mean(0)
    # The system is solved in float64 on the CPU. Its condition is poor, because features are correlated.
    gram_CC = (scaled_TC.T @ scaled_TC / len(scaled_TC)).cpu().double()
    moment_CK = (scaled_TC.T @ (shares_TK - share_K) / len(scaled_TC)).cpu().double()
    gram_CC.diagonal().add_(ridge)
    weight_CK = torch.linalg.solve(gram_CC, moment_CK).to(scaled_TC)
    scores_TK = scaled_TC @ weight_CK + share_K
    threshold_K = torch.stack([best_threshold(s, y) for s, y in zip(scores_TK.T, shares_TK.T, strict=True)])
    weight_KC = weight_CK.T * scale_C
    return LinearHead(weight_KC=weight_KC, bias_K=share_K - weight_KC @ mean_C - threshold_K)


def best_threshold(scores_T: Tensor, shares_T: Tensor) -> Tensor:
    """Return the threshold of the scores with the best Dice."""
    # Sorted by score, the k first tokens are the foreground of the k-th threshold, and cumulative sums give all Dice.
    order = scores_T.argsort(descending=True)
    sorted_T = scores_T[order]
    count_T = torch.arange(1, len(order) + 1, device=scores_T.device, dtype=scores_T.dtype)
    dice_T = 2 * shares_T[order].cumsum(0) / (count_T + shares_T.sum())
    last = int(dice_T.argmax())
    after = sorted_T[last + 1] if last + 1 < len(sorted_T) else sorted_T[last] - 1
    return (sorted_T[last] + after) / 2


class DiceCount:
    """Pixel counts per patient and class, from which Dice is computed."""

    def __init__(self, class_ids: Sequence[int]) -> None:
        self.class_ids = tuple(class_ids)
        self._counts: dict[str, Tensor] = {}

    def add(self, patient_id: str, predicted_HW: Tensor, label_HW: Tensor) -> None:
        """Count the annotated pixels of one slice."""
        predicted_HW = predicted_HW.masked_fill(label_HW == IGNORE_LABEL, 0)
        counts = [
            [int((p & t).sum()), int(p.sum()) + int(t.sum())]
            for p, t in ((predicted_HW == i, label_HW == i) for i in self.class_ids)
        ]
        self._counts[patient_id] = self._counts.get(patient_id, torch.zeros(len(counts), 2)) + torch.tensor(counts)

    def dice(self) -> float:
        """Return the mean Dice over the present classes of each patient, then over patients."""
        per_patient = []
        for counts_K2 in self._counts.values():
            known = counts_K2[counts_K2[:, 1] > 0]
            if len(known):
                per_patient.append(float((2 * known[:, 0] / known[:, 1]).mean()))
        return sum(per_patient) / len(per_patient) if per_patient else float("nan")


@torch.no_grad()
def probe_dice(
    encoder: ImageEncoder,
    data: ProbeData,
    *,
    ridge: float,
    batch_size: int,
    device: torch.device,
    on_features: Callable[[int, Tensor], None] | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> float:
    """Fit the head on the training slices and return its foreground Dice on the test slices.

    Args:
        encoder: Encoder in evaluation mode, which is not changed.
        data: Slices with labels.
        ridge: Weight of the penalty, see ``fit_head``.
        batch_size: Number of slices per forward pass.
        device: Device of the encoder.
        on_features: Function that receives the number of the first slice and the features (B, C, h, w) of every batch
            of test slices, so that the box-prompt check needs no second forward pass.
        check_stop: Function that is called between the parts and may raise.
    """
    # The features of all training slices are in memory, because the fit and its thresholds need them together.
    features = encode(encoder, data.train.images_N1SS, batch_size=batch_size, device=device)
    check_stop()
    shares_NKhw, inside_Nhw = class_shares(data.train, data.class_ids, stride=encoder.stride)
    chosen = inside_Nhw.flatten()
    tokens_TC = torch.cat([f.float().flatten(2).mT.flatten(0, 1) for f in features])[chosen.to(device)]
    shares_TK = shares_NKhw.flatten(2).mT.flatten(0, 1)[chosen].to(device)
    head = fit_head(tokens_TC, shares_TK, ridge=ridge)
    # Freed before the test slices are encoded, because they are large at 1024 px.
    del features, tokens_TC
    count = DiceCount(data.class_ids)
    for first in range(0, len(data.test), batch_size):
        check_stop()
        (features_BChw,) = encode(
            encoder, data.test.images_N1SS[first : first + batch_size], batch_size=batch_size, device=device
        )
        if on_features is not None:
            on_features(first, features_BChw)
        for offset, scores_Khw in enumerate(head.scores(features_BChw)):
            n = first + offset
            predicted_HW = to_label_ids(scores_Khw, data.test.frames[n], data.class_ids)
            count.add(data.test.patient_ids[n], predicted_HW, data.test.labels[n])
    return count.dice()


def to_label_ids(scores_Khw: Tensor, frame: InputFrame, class_ids: Sequence[int]) -> Tensor:
    """Return label ids (H, W) at the native size of the slice, on the CPU."""
    # Scores are resized and not labels, so that borders are not limited to the grid of tokens.
    scores_KHW = logits_to_native(scores_Khw[None], frame)[0].cpu()
    best, channel = scores_KHW.max(0)
    ids = torch.tensor(class_ids)[channel]
    return torch.where(best > 0, ids, torch.zeros_like(ids))
