import numpy as np
import pytest
import torch
from torch import Tensor

from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.errors import DataError
from voxelbridge.pretrain_sup.batches import MultiDatasetSampler, SegmentationBatch
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels
from voxelbridge.pretrain_sup.label_space import LabelSpace, build_label_space
from voxelbridge.pretrain_sup.sampling import Sampling

Many = tuple[CaseStore, LabelSpace]
PATCH = (8, 8, 8)


def sampler(
    many: Many,
    *,
    num_patches: int = 4,
    augmentation: SpatialAugmentation | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> MultiDatasetSampler:
    store, space = many
    names = [record.case_id for record in store.cases]
    return MultiDatasetSampler.build(
        store, space, names, patch_size=PATCH, num_patches=num_patches, seed=seed,
        sampling=sampling, augmentation=augmentation, rank=rank, ranks=ranks,
    )  # fmt: skip


def equal(first: SegmentationBatch, second: SegmentationBatch) -> bool:
    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    return (
        same(first["images"], second["images"])
        and same(first["segmentations"], second["segmentations"])
        and first["datasets"] == second["datasets"]
        and first["heads"] == second["heads"]
        and first["cases"] == second["cases"]
    )


def test_a_batch_is_ragged_in_channels(many_classes: Many) -> None:
    make = sampler(many_classes, num_patches=12)
    batch = make(0)
    channels = {"bones": 1, "glioma": 2}
    assert len(batch["images"]) == 12
    assert set(batch["datasets"]) == set(channels)
    for image, labels, dataset, head, case in zip(*batch.values(), strict=True):
        assert (image.shape, image.dtype) == ((channels[dataset], *PATCH), torch.float32)
        assert (labels.shape, labels.dtype) == (PATCH, torch.int32)
        assert make.space.head(head).dataset == dataset
        assert case.startswith(f"{dataset}__")


def test_labels_keep_their_ids_and_lie_on_their_voxels(many_classes: Many) -> None:
    # images hold the ids themselves, 0 outside where labels hold -1
    batch = sampler(many_classes, num_patches=16, augmentation=SpatialAugmentation.mirroring())(0)
    outside = 0
    for image, labels in zip(batch["images"], batch["segmentations"], strict=True):
        assert torch.equal(image[0], labels.clamp(min=0).float())
        outside += int((labels == -1).sum())
    assert outside > 0


def test_turned_and_scaled_labels_follow_the_image(many_classes: Many) -> None:
    always = SpatialAugmentation(rotation_probability=1.0, scale_probability=1.0)
    on_target = Sampling(dataset_weights={"glioma": 0.0}, foreground_probability=1.0)
    make = sampler(many_classes, num_patches=20, augmentation=always, sampling=on_target)
    agree = total = 0
    for image, labels in zip(make(0)["images"], make(0)["segmentations"], strict=True):
        assert set(labels.unique().tolist()) <= {-1, 0, *range(2, 353, 3)}
        shown = labels > 0
        agree += int((image[0][shown] > 0).sum())  # linear weights of a labelled voxel are not 0
        total += int(shown.sum())
    assert agree == total > 100


def test_patches_outside_the_volume_are_padded(many_classes: Many) -> None:
    only = Sampling(dataset_weights={"bones": 0.0})
    batch = sampler(many_classes, sampling=only, augmentation=SpatialAugmentation.none())(0)
    for image, labels in zip(batch["images"], batch["segmentations"], strict=True):
        assert (labels[[0, -1]] == -1).all()  # the volume is 6 voxels deep
        assert (labels[1:-1] >= 0).all()
        assert (image[:, [0, -1]] == 0).all()


def test_every_patch_holds_a_target_where_it_must(many_classes: Many) -> None:
    make = sampler(
        many_classes, num_patches=30, sampling=Sampling(foreground_probability=1.0),
        augmentation=SpatialAugmentation.none(),
    )  # fmt: skip
    batch = make(0)
    for labels, head in zip(batch["segmentations"], batch["heads"], strict=True):
        ids = {number for target in make.space.head(head).targets for number in target.ids}
        assert ids & set(labels.unique().tolist())


def test_ranks_draw_together_what_one_process_draws(many_classes: Many) -> None:
    whole = sampler(many_classes, num_patches=6)
    parts = [sampler(many_classes, num_patches=3, rank=rank, ranks=2) for rank in range(2)]
    for number in range(3):
        halves = [part(number) for part in parts]
        joined = SegmentationBatch(
            images=halves[0]["images"] + halves[1]["images"],
            segmentations=halves[0]["segmentations"] + halves[1]["segmentations"],
            datasets=halves[0]["datasets"] + halves[1]["datasets"],
            heads=halves[0]["heads"] + halves[1]["heads"],
            cases=halves[0]["cases"] + halves[1]["cases"],
        )
        assert equal(whole(number), joined)


def test_a_pass_can_be_made_again_and_passes_differ(many_classes: Many) -> None:
    assert equal(sampler(many_classes)(5), sampler(many_classes)(5))
    assert not equal(sampler(many_classes)(5), sampler(many_classes)(6))
    assert not equal(sampler(many_classes)(5), sampler(many_classes, seed=1)(5))


def test_workers_make_the_batches_that_one_process_makes(many_classes: Many) -> None:
    make = sampler(many_classes)
    alone, helped = (
        list(step_batches(make, seed=0, first_step=2, steps=6, workers=workers))
        for workers in (0, 2)
    )
    assert len(alone) == len(helped) == 4
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert equal(alone[0], make(2))


def test_validation_patches_are_fixed_and_not_augmented(many_classes: Many) -> None:
    store, _ = many_classes
    held_out = sampler(many_classes).for_validation(["bones__c1", "glioma__g"])
    batches = [held_out.validation_batch(index) for index in range(20)]
    again = sampler(many_classes, rank=1, ranks=2, num_patches=7).for_validation(
        ["bones__c1", "glioma__g"]
    )
    assert all(equal(batch, again.validation_batch(n)) for n, batch in enumerate(batches))
    assert {len(batch["images"]) for batch in batches} == {1}
    cases = [batch["cases"][0] for batch in batches]
    assert set(cases) == {"bones__c1", "glioma__g"}
    assert 6 <= cases.count("glioma__g") <= 14  # data sets are drawn alike
    volume = store.read_segmentation_patch("bones__c1", (0, 0, 0), (30, 30, 30))
    windows = np.lib.stride_tricks.sliding_window_view(volume, PATCH)
    shown = batches[cases.index("bones__c1")]["segmentations"][0].numpy()
    assert (windows == shown).all(axis=(3, 4, 5)).any()


def test_a_store_that_does_not_fit_the_label_space_is_refused(many_classes: Many) -> None:
    store, space = many_classes
    bones, glioma = space.datasets
    only_bones = build_label_space([bones], layout="per_dataset")
    with pytest.raises(DataError, match="no data set 'glioma' in the label space"):
        sampler((store, only_bones))
    one_channel = DatasetLabels("glioma", ("T1c",), glioma.targets, None, 1, regions=True)
    other = build_label_space([bones, one_channel], layout="per_dataset")
    with pytest.raises(DataError, match="case glioma__g has 2 channels, data set glioma has 1"):
        sampler((store, other))


def test_the_joint_layout_has_one_head_per_data_set(many_classes: Many) -> None:
    store, space = many_classes
    joint = build_label_space(space.datasets, layout="joint")
    batch = sampler((store, joint), num_patches=8)(0)
    assert batch["heads"] == batch["datasets"]
