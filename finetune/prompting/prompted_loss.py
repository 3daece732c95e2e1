"""Loss of a training step with prompts drawn from the labels.

Shape letters: N = slices, C = foreground classes, S = side of the encoder's input, P = objects, M = masks per prompt,
h, w = embedding grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from samgraft.finetune.classes import IGNORE_LABEL
from samgraft.finetune.loss import LossConfig, MaskLoss, on_loss_grid
from samgraft.finetune.prompting.prompt_sampling import (
    ClassPrompt,
    PromptConfig,
    PromptMode,
    add_correction_click,
    draw_prompts,
    find_objects,
    mask_prompt,
    thin_out,
)
from samgraft.finetune.prompting.prompts import Prompt, best_masks, decode_prompts
from samgraft.shared.encoders.base import ImageFeatures
from torch import Tensor, nn

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

PROMPT_STREAM = 4
"""Second number of the seed of a sample's prompts. Its augmentation has 1."""


class PromptedLoss(nn.Module):
    """Mask loss and IoU loss over the objects of a batch, as in SAM's training.

    A single point is ambiguous, so only the mask with the lowest loss of the three counts. The IoU head learns the IoU
    of every mask that was decoded. With clicks every round has the same weight.

    Source:
        Segment Anything, arXiv 2304.02643, appendix A, "Training algorithm".
    """

    def __init__(self, prompt: PromptConfig, loss: LossConfig, *, seed: int) -> None:
        super().__init__()
        self.prompt = prompt
        self.mask_loss = MaskLoss(loss)
        self.seed = seed

    def forward(
        self, sam: Sam, features: ImageFeatures, masks_NCSS: Tensor, sample_counters: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return ``loss`` and its parts, a loss of 0 for a batch without objects.

        Args:
            sam: Model; its prompt encoder and mask decoder are used.
            features: Features of the slices.
            masks_NCSS: Pixels of every class in the input frame, 0 and 1, with ``IGNORE_LABEL`` where nothing is
                annotated.
            sample_counters: Counters of the slices. With the seed they determine objects and prompts.
        """
        drawn = self._draw(sam, masks_NCSS, sample_counters)
        if not drawn:
            # The zero depends on every trained parameter, so that backward, gradient synchronisation and the optimizer
            # step work as in any other step.
            nothing = sum((p.sum() * 0.0 for p in sam.parameters() if p.requires_grad), features.embeddings.sum() * 0)
            return {"loss": nothing}
        prompts = [one.prompt for one in drawn]
        objects_PSS = np.stack([one.true_HW for one in drawn if one.true_HW is not None])
        device = features.embeddings.device
        ignored_NSS = (masks_NCSS[:, 0] == IGNORE_LABEL).to(device)
        true_PSS = torch.from_numpy(objects_PSS).to(device, torch.int64)
        true_PSS = true_PSS.masked_fill(ignored_NSS[[one.prompt.image for one in drawn]], IGNORE_LABEL)
        rounds = 1 + (self.prompt.num_clicks if self.prompt.mode is PromptMode.CLICKS else 0)
        mask_loss = iou_loss = features.embeddings.new_zeros((), dtype=torch.float32)
        for number in range(rounds):
            per_mask_P, iou_error_P, best_Phw = self._decode(sam, features, prompts, true_PSS)
            mask_loss = mask_loss + per_mask_P.mean() / rounds
            iou_loss = iou_loss + iou_error_P.mean() / rounds
            if number + 1 < rounds:
                prompts = _add_clicks(prompts, drawn, best_Phw)
        return {
            "loss": mask_loss + self.prompt.iou_weight * iou_loss,
            "loss/mask": mask_loss.detach(),
            "loss/iou": iou_loss.detach(),
        }

    def _draw(self, sam: Sam, masks_NCSS: Tensor, sample_counters: Sequence[int]) -> list[ClassPrompt]:
        to_mask = partial(mask_prompt, side=int(sam.prompt_encoder.mask_input_size[0]))
        drawn: list[ClassPrompt] = []
        # An ignored pixel is no object, but neither is it outside of one. Prompts are drawn from annotated pixels only.
        present_NCSS = (masks_NCSS > 0).cpu().numpy()
        for image, (masks_CSS, counter) in enumerate(zip(present_NCSS, sample_counters, strict=True)):
            rng = np.random.default_rng([self.seed, PROMPT_STREAM, int(counter)])
            objects = thin_out(find_objects(masks_CSS, self.prompt), self.prompt, rng)
            drawn += draw_prompts(objects, self.prompt, rng, image=image, to_mask=to_mask, central=False)
        return drawn

    def _decode(
        self, sam: Sam, features: ImageFeatures, prompts: Sequence[Prompt], true_PSS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, squared error of the IoU and best mask of every prompt."""
        places: list[int] = []
        losses, errors, best = [], [], []
        for ambiguous in (False, True):
            chosen = [place for place, prompt in enumerate(prompts) if prompt.is_ambiguous is ambiguous]
            if not chosen:
                continue
            logits_PMhw, iou_PM = decode_prompts(
                sam, features, [prompts[place] for place in chosen], multimask=ambiguous
            )
            count, masks = iou_PM.shape
            true = true_PSS[chosen].repeat_interleave(masks, dim=0)
            loss_PM = self.mask_loss(logits_PMhw.flatten(0, 1), true).view(count, masks)
            losses.append(loss_PM.min(dim=1).values)
            # The head learns the IoU of the masks as they are, so no gradient flows into them.
            true_iou_PM = _iou(logits_PMhw.detach().flatten(0, 1), true).view(count, masks)
            errors.append((iou_PM.float() - true_iou_PM).square().mean(dim=1))
            # A user sees the mask with the best predicted IoU and corrects that one.
            best.append(best_masks(logits_PMhw.detach().float(), iou_PM.detach())[0])
            places += chosen
        back = torch.argsort(torch.tensor(places, device=true_PSS.device))
        return torch.cat(losses)[back], torch.cat(errors)[back], torch.cat(best)[back]


def _add_clicks(prompts: Sequence[Prompt], drawn: Sequence[ClassPrompt], best_Phw: Tensor) -> list[Prompt]:
    """Return the prompts of the next round, on the grid of the objects."""
    assert drawn[0].true_HW is not None
    side = drawn[0].true_HW.shape[-1]
    logits_PSS, _ = on_loss_grid(best_Phw[:, None], best_Phw.new_zeros(len(best_Phw), 1, side, side), size=None)
    predicted_PSS = (logits_PSS[:, 0] > 0).cpu().numpy()
    return [
        add_correction_click(prompt, one, predicted_SS, low_res_logits=logits_hw, central=False)
        for prompt, one, predicted_SS, logits_hw in zip(prompts, drawn, predicted_PSS, best_Phw, strict=True)
    ]


def _iou(logits_Phw: Tensor, true_PSS: Tensor) -> Tensor:
    """Return the IoU (P,) of masks above 0 with the truth, on the annotated pixels of the truth's grid."""
    logits, _ = on_loss_grid(logits_Phw[:, None], true_PSS[:, None], size=None)
    predicted, present = (logits[:, 0] > 0) & (true_PSS != IGNORE_LABEL), true_PSS > 0
    union = (predicted | present).flatten(1).sum(dim=1)
    return (predicted & present).flatten(1).sum(dim=1) / union.clamp(min=1)
