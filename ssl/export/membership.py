"""Membership audit of a self-supervised state, run before such a state is released.

Masked-image models reconstruct their training slices better than other slices, and an attacker with encoder and decoder
can threshold that error (arXiv 2408.06825). The audit runs this published attack and computes its AUC on members
against held-out patients. As a control it computes the AUC on two halves of the members, because a difference between
arbitrary groups of patients looks like a successful attack (arXiv 2212.01082).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from samgraft.shared.config import load_config, read_stored_config
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, UsageError, WeightsError
from samgraft.shared.runs.inputs import load_run_split
from samgraft.shared.samples.dataset import SliceDataset, batch_to_input, collate_slices
from samgraft.shared.samples.slices import SliceRef
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import choose_device
from samgraft.shared.weights.load import load_into, read_weights
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.export.encoder_weights import ENCODER_FOLDER
from samgraft.ssl.monitor.held_out import spread_evenly, spread_slices
from samgraft.ssl.objectives import Objective, build_objective
from samgraft.ssl.preflight import pretraining_split
from samgraft.ssl.ssl_state import StateUse, find_state, restore_ssl_state
from scipy.stats import rankdata

log = logging.getLogger(__name__)

NUM_SLICES = 32
"""Number of slices per group, evenly spread over its patients. A group with fewer usable slices has all of them."""
NUM_MASKS = 4
"""Number of masks per slice, over which the error is averaged as an attacker would do."""
AUDIT_COUNTER = 1 << 41
"""First sample counter of the audit, so that its masks differ from those of training and monitoring."""


@dataclass(frozen=True, kw_only=True)
class MembershipAudit:
    """AUC of the attack by reconstruction error. 0.5 is chance, 1 identifies every member."""

    auc_held_out: float
    """AUC of members against held-out patients."""
    auc_control: float
    """AUC of one half of the members against the other, which shows chance and differences between patients."""
    num_member_patients: int
    """Number of patients with a slice in the audit, as below."""
    num_held_out_patients: int
    num_slices: tuple[int, int]
    """Number of slices of members and of held-out patients."""

    def render(self) -> str:
        """Return the sentences for the card."""
        members, others = self.num_slices
        return (
            "Attack by reconstruction error, AUC (0.5 is chance): members against held-out patients "
            f"**{self.auc_held_out:.3f}**; control, one half of the members against the other "
            f"**{self.auc_control:.3f}**. {counted(members, 'slice')} of "
            f"{counted(self.num_member_patients, 'member patient')}, {others} slices of "
            f"{counted(self.num_held_out_patients, 'held-out patient')}, {counted(NUM_MASKS, 'mask')} each. With few "
            "patients both numbers depend more on those patients than on the attack. No differential privacy was "
            "used."
        )


def audit_membership(run: Path) -> MembershipAudit:
    """Attack a finished stage-1 run with the state that would be released.

    Args:
        run: Folder of the run with configuration, encoder and ssl_state. Its store must still exist.

    Raises:
        UsageError: If no patient was held out.
        DataError: If the store has changed since the run.
        WeightsError: If the state does not match the encoder.
    """
    config = load_config(PretrainConfig, layers=[read_stored_config(run / "config.yaml")])
    store = SliceStore.open(config.data.store)
    objective, fingerprint = load_objective(run, config)
    if fingerprint not in (None, store.fingerprint):
        raise DataError("the store must be that of the run, but its fingerprint differs.", where=run.name)
    # The run's own copy lacks the patients that were left out, unlike the configured file.
    split = load_run_split(run, store) or pretraining_split(config.data, store, seed=config.seed)
    if not split.val:
        raise UsageError(
            "the membership audit needs held-out patients, and the run has none. Release the encoder alone.",
            next_command="the same command without --continuable",
        )
    device = choose_device().torch_device
    objective.to(device)
    # Alternating patients, because the order of patient ids often follows the time or the site of the scan.
    halves = [audit_slices(store, half, config) for half in (split.train[0::2], split.train[1::2]) if half]
    if len(halves) < 2:
        # With one member patient the control compares two halves of its slices.
        halves = [halves[0][0::2], halves[0][1::2]]
    groups = [*halves, audit_slices(store, split.val, config)]
    first, second, others = (_errors(objective, config, store, refs, device=device) for refs in groups)
    return MembershipAudit(
        auc_held_out=attack_auc(np.concatenate([first, second]), others),
        auc_control=attack_auc(first, second),
        num_member_patients=_count_patients(store, groups[0] + groups[1]),
        num_held_out_patients=_count_patients(store, groups[2]),
        num_slices=(len(first) + len(second), len(others)),
    )


def audit_slices(store: SliceStore, patients: Sequence[str], config: PretrainConfig) -> list[SliceRef]:
    """Return ``NUM_SLICES`` slices, evenly spread over the patients and over the slices of each."""
    # More slices than wanted of a few patients, or one slice each of some of many. Both are thinned out evenly.
    chosen = [patients[i] for i in spread_evenly(len(patients), NUM_SLICES)]
    per_patient = -(-NUM_SLICES // len(chosen))
    refs = spread_slices(store, chosen, per_patient, config=config.data, preset=load_preset(config.modality))
    return [refs[i] for i in spread_evenly(len(refs), NUM_SLICES)]


def _count_patients(store: SliceStore, refs: Sequence[SliceRef]) -> int:
    return len({store.record(ref.series_id).patient_id for ref in refs})


def attack_auc(members: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> float:
    """Return the share of (member, other) pairs in which the member has the smaller error.

    Raises:
        UsageError: If one side has no slices.
    """
    # The rank sum of Mann and Whitney, in which ties count half.
    if len(members) == 0 or len(others) == 0:
        raise UsageError("the membership audit needs slices of members and of held-out patients, one group has none.")
    ranks = rankdata(np.concatenate([members, others]))
    above = ranks[len(members) :].sum() - len(others) * (len(others) + 1) / 2
    return float(above / (len(members) * len(others)))


def load_objective(run: Path, config: PretrainConfig) -> tuple[Objective, str | None]:
    """Rebuild the objective of a finished run, and return it with the fingerprint of the run's store."""
    weights = read_weights(run / ENCODER_FOLDER / "encoder.safetensors")
    encoder = weights.spec.build(image_size=weights.image_size)
    load_into(encoder, weights, part="image_encoder")
    objective = build_objective(encoder, config.objective, seed=config.seed, max_steps=config.trainer.max_steps)
    if find_state(str(run)) is None:
        raise WeightsError("the run must contain an ssl_state, and has none.", where=run.name)
    restore_ssl_state(objective, initial_weights=str(run), objective_name=config.objective.name, use=StateUse.REQUIRE)
    fingerprint = weights.card.data_manifest.get("fingerprint") if weights.card else None
    return objective.eval(), fingerprint


@torch.no_grad()
def _errors(
    objective: Objective, config: PretrainConfig, store: SliceStore, refs: Sequence[SliceRef], *, device: torch.device
) -> npt.NDArray[np.float64]:
    """Return the mean loss per slice over ``NUM_MASKS`` masks."""
    preset = load_preset(config.modality)
    dataset = SliceDataset(store, refs, intensity=preset.intensity, num_neighbours=config.data.num_neighbours)
    errors = []
    for index in range(len(refs)):
        # The same masks for every slice, so that differences come from the slices.
        counters = [AUDIT_COUNTER + mask for mask in range(NUM_MASKS)]
        batch = collate_slices([dataset[index, counter] for counter in counters])
        images, _, _ = batch_to_input(
            batch, image_size=config.model.image_size, keep_aspect=config.data.keep_aspect, device=device
        )
        # Schedules are at their end, as an attacker with the final state would have them.
        last = config.trainer.max_steps
        loss = objective.loss(images, sample_counters=counters, step=last, planes=batch["planes"]).total
        errors.append(float(loss))
    return np.asarray(errors, dtype=np.float64)
