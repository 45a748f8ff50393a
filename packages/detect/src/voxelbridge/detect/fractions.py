"""A stated fraction of the training patients, so that fewer labels can be studied.

The patients are put in an order by the seed alone, and a fraction takes the first of them: ten per
cent are part of thirty, whatever else changes. The first one has an object where any patient has.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_STREAM = 5  # keeps this random stream apart from those of the split and of training


@dataclass(frozen=True)
class CaseShare:
    """The training cases of a fold that a run uses."""

    case_ids: list[str]  # in the order of the fold
    num_patients: int
    of_patients: int


def share_of_cases(
    case_ids: Sequence[str],
    patients: Mapping[str, str],
    *,
    fraction: float,
    seed: int,
    with_objects: Collection[str],
) -> CaseShare:
    """All cases of round(`fraction` x patients) patients, at least one, the same for equal names.

    `patients` names the patient of a case, `with_objects` the cases that have an object. A fraction
    of 1 keeps every case.
    """
    annotated = {patients[case_id] for case_id in case_ids if case_id in with_objects}
    order = _order({patients[case_id] for case_id in case_ids}, annotated, seed)
    count = max(1, round(fraction * len(order)))
    chosen = set(order[:count])
    return CaseShare(
        [case_id for case_id in case_ids if patients[case_id] in chosen], count, len(order)
    )


def _order(patients: set[str], annotated: set[str], seed: int) -> list[str]:
    names = sorted(patients)
    rng = np.random.default_rng(np.random.SeedSequence((seed, _STREAM)))
    order = [names[index] for index in rng.permutation(len(names))]
    first = next((name for name in order if name in annotated), None)
    if first is not None:
        order.remove(first)
        order.insert(0, first)
    return order
