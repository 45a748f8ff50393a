import pytest
import torch

from voxelbridge.core.train.steps import evaluating
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target
from voxelbridge.pretrain_sup.label_space import LabelSpace, build_label_space
from voxelbridge.pretrain_sup.validation import pseudo_dice, target_counts

ORGANS = DatasetLabels(
    "organs", ("CT",), (Target("a", (4,)), Target("b", (7,)), Target("c", (9,))), 5, 2
)
TUMOUR = DatasetLabels(
    "tumour", ("CT",), (Target("liver", (1, 2)), Target("tumour", (2,))), None, 2, regions=True
)


def space() -> LabelSpace:
    return build_label_space([ORGANS, TUMOUR], layout="per_dataset", max_targets=2)


def test_softmax_voxels_are_counted_where_annotated() -> None:
    head = space().head("organs.0")  # a, b
    labels = torch.tensor([[[4, 4, 7, 9, 5, -1, 0]]])
    chosen = torch.tensor([[[1, 2, 2, 1, 1, 1, 0]]])
    logits = torch.nn.functional.one_hot(chosen, 3).movedim(-1, 0).float()
    counts = target_counts(head, logits, labels)
    assert counts.tolist() == [[1, 1], [2, 2], [2, 1]]


def test_region_voxels_are_counted_each_on_its_own() -> None:
    labels = torch.tensor([[[0, 1, 2, -1]]])
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, 1.0]])[:, None, None]
    counts = target_counts(space().head("tumour"), logits, labels)
    assert counts.tolist() == [[2, 1], [3, 1], [2, 1]]


def test_pseudo_dice_joins_ranks_and_leaves_out_what_has_no_voxel() -> None:
    ranks = [
        {"organs.0": [[1, 0], [2, 5], [2, 0]]},
        {"organs.0": [[1, 0], [1, 0], [2, 0]], "organs.1": [[0], [0], [4]]},
        {},
    ]
    # a: 2 * 2 / (3 + 4); b has no voxel; c: 0
    assert pseudo_dice(space(), ranks) == pytest.approx({"val_organs.dice": (4 / 7 + 0) / 2})


def test_evaluating_ends_in_training() -> None:
    module = torch.nn.Dropout()
    with evaluating(module):
        assert not module.training
    assert module.training
