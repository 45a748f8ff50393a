"""Label maps of whole volumes, from networks whose answer is known."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig
from voxelbridge.core.errors import DataError
from voxelbridge.core.tiles import Triple, padded_tiles, read_window
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target
from voxelbridge.pretrain_sup.label_space import Head, LabelSpace, Layout, build_label_space
from voxelbridge.pretrain_sup.model import SegmentationNetwork, build_network
from voxelbridge.pretrain_sup.predict import (
    Predictor,
    merge_heads,
    mirrorings,
    predict_labels,
    probability_planes,
)

RigNetwork = Callable[..., None]

ENCODER = EncoderConfig(
    kind="residual",
    features=(2, 2),
    strides=((1, 1, 1), (2, 2, 2)),
    kernels=((3, 3, 3),) * 2,
    blocks=(1, 1),
    conv_bias=True,
)
DECODER = DecoderConfig(convs_per_stage=(1,), conv_bias=True)
CPU = torch.device("cpu")
LEVELS = (Target("low", (7,)), Target("middle", (3,)), Target("high", (300,)))
ORGANS = DatasetLabels("organs", ("CT",), LEVELS, None, 4)
TUMOUR = DatasetLabels(
    "tumour", ("T1", "T2"), (Target("whole", (1, 2)), Target("core", (2,))), None, 4, regions=True
)


def space_of(layout: Layout, *, max_targets: int = 20) -> LabelSpace:
    return build_label_space([ORGANS, TUMOUR], layout=layout, max_targets=max_targets)


def network_of(space: LabelSpace) -> SegmentationNetwork:
    torch.manual_seed(0)
    stems = {dataset.name: len(dataset.channels) for dataset in space.datasets}
    return build_network(
        ENCODER, DECODER, stems=stems, heads=space.output_layers, init="torch_default"
    ).eval()


def predictor_of(
    network: SegmentationNetwork,
    space: LabelSpace,
    dataset: str = "organs",
    *,
    patch_size: Triple = (4, 6, 8),
    mirror_axes: tuple[int, ...] = (),
) -> Predictor:
    heads = [head.name for head in space.heads_of(dataset)]
    return Predictor.build(
        network,
        space,
        heads=heads,
        stem=dataset,
        patch_size=patch_size,
        device=CPU,
        mirror_axes=mirror_axes,
    )


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def all_planes(predictor: Predictor, image: np.ndarray) -> Tensor:
    return torch.cat([block.clone() for block in probability_planes(predictor, image)], dim=1)


def slow_probabilities(predictor: Predictor, image: np.ndarray) -> np.ndarray:
    """The plain way: one array for sums and one for weights over the padded volume."""
    size, extent = predictor.patch_size, image.shape[1:]
    before = [max(0, (edge - n) // 2) for n, edge in zip(extent, size, strict=True)]
    after = [max(0, edge - n) - b for n, edge, b in zip(extent, size, before, strict=True)]
    padded = np.pad(image, [(0, 0), *zip(before, after, strict=True)])
    places = [(np.arange(edge) - (edge - 1) / 2) / (edge / 8) for edge in size]
    z, y, x = np.meshgrid(*places, indexing="ij")
    weight = np.exp(-0.5 * (z**2 + y**2 + x**2))
    total = np.zeros((predictor.num_outputs, *padded.shape[1:]))
    count = np.zeros(padded.shape[1:])
    for start in padded_tiles(padded.shape[1:], size):
        inside = tuple(slice(s, s + edge) for s, edge in zip(start, size, strict=True))
        window = torch.from_numpy(padded[(slice(None), *inside)].copy())[None]
        copies = []
        for axes in mirrorings(predictor.mirror_axes):
            turned = [2 + axis for axis in axes]
            with torch.no_grad():
                logits = predictor.network.predict(
                    window.flip(turned),
                    stem=predictor.stem,
                    heads=[head.name for head in predictor.heads],
                )
            parts = [
                logits[head.name].sigmoid() if head.regions else logits[head.name].softmax(1)
                for head in predictor.heads
            ]
            copies.append(torch.cat(parts, 1).flip(turned)[0].numpy())
        total[(slice(None), *inside)] += weight * np.mean(copies, axis=0)
        count[inside] += weight
    kept = tuple(slice(b, b + n) for b, n in zip(before, extent, strict=True))
    return (total / count)[(slice(None), *kept)]


@pytest.mark.parametrize("layout", ["per_dataset", "joint"])
@pytest.mark.parametrize("dataset", ["organs", "tumour"])
@pytest.mark.parametrize("extent", [(11, 13, 15), (4, 6, 8), (3, 20, 5), (1, 1, 1)])
def test_rows_of_windows_give_what_whole_arrays_give(
    layout: Layout, dataset: str, extent: Triple
) -> None:
    space = space_of(layout, max_targets=2)
    predictor = predictor_of(network_of(space), space, dataset, mirror_axes=(0, 2))
    image = noise(len(space.dataset(dataset).channels), *extent)
    found = all_planes(predictor, image)
    assert found.shape[1:] == extent
    np.testing.assert_allclose(found, slow_probabilities(predictor, image), atol=2e-6)


@settings(deadline=None, max_examples=20)
@given(st.tuples(*[st.integers(1, 30)] * 3), st.tuples(*[st.integers(2, 12)] * 3))
def test_padded_windows_cover_every_voxel(shape: Triple, patch: Triple) -> None:
    seen = np.zeros((1, *shape), dtype=np.float32)
    number = np.arange(1, 1 + seen.size, dtype=np.float32).reshape(seen.shape)
    for start in padded_tiles(shape, patch):
        window = read_window(number, start, patch)
        assert window.shape == (1, *patch)
        seen.reshape(-1)[window[window > 0].astype(int) - 1] = 1
    assert seen.all()


def test_a_function_of_voxels_is_seen_through_windows_and_mirrorings_unchanged(
    rig_network: RigNetwork,
) -> None:
    space = space_of("per_dataset")
    network = network_of(space)
    # class k where the image is nearest to k - 1: k * x - k^2 / 2 is the largest
    slopes = [-1.0, 0.0, 1.0, 2.0]
    rig_network(network, {"organs": (slopes, [-0.5 * k * k for k in slopes])}, norms=False)
    image = noise(1, 10, 13, 9) * 2
    expected = np.array([0, 7, 3, 300])[np.clip(np.rint(image[0]), -1, 2).astype(int) + 1]
    for mirror_axes in ((), (0, 1, 2)):
        predictor = predictor_of(network, space, mirror_axes=mirror_axes)
        labels = predict_labels(predictor, image)
        assert labels.dtype == np.uint16
        np.testing.assert_array_equal(labels, expected)


def test_mirroring_averages_what_the_mirrored_image_gives() -> None:
    space = space_of("per_dataset")
    network = network_of(space)
    image = noise(1, 4, 6, 8)
    plain = predictor_of(network, space)
    mirrored = predictor_of(network, space, mirror_axes=(1,))
    flipped = np.ascontiguousarray(image[:, :, ::-1])
    expected = (all_planes(plain, image) + all_planes(plain, flipped).flip(2)) / 2
    np.testing.assert_allclose(all_planes(mirrored, image), expected, atol=1e-6)
    assert not torch.allclose(all_planes(plain, image), expected, atol=1e-3)
    assert len(mirrorings((0, 1, 2))) == len(set(mirrorings((0, 1, 2)))) == 8


@pytest.mark.parametrize("shape", [(9, 5, 20), (33, 17, 8), (10, 13, 11), (1, 1, 1)])
def test_another_grid_gets_linearly_interpolated_probabilities(
    rig_network: RigNetwork, shape: Triple
) -> None:
    space = space_of("per_dataset")
    network = network_of(space)
    rig_network(network, {"organs": ([0.0, 1.0, -1.0, 0.3], [0.2, 0.0, 0.0, 0.0])}, norms=False)
    predictor = predictor_of(network, space)
    image = noise(1, 10, 13, 11)
    planes = all_planes(predictor, image)[None]
    expected = F.interpolate(planes, size=shape, mode="trilinear")[0]
    found = predict_labels(predictor, image, shape=shape)
    ids = torch.tensor([0, 7, 3, 300])[expected.argmax(0)].numpy()
    top = expected.topk(2, dim=0).values
    decided = (top[0] - top[1] > 1e-5).numpy()
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(found[decided], ids[decided])


def test_parts_of_a_split_data_set_become_one_map_by_the_highest_probability() -> None:
    space = space_of("per_dataset", max_targets=2)
    heads = space.heads_of("organs")
    assert [len(head.targets) for head in heads] == [2, 1]
    # background, low, middle | background, high
    columns = [
        ([0.8, 0.1, 0.1, 0.9, 0.1], 0),  # background in both
        ([0.1, 0.2, 0.7, 0.9, 0.1], 3),  # a target in one
        ([0.6, 0.3, 0.1, 0.2, 0.8], 300),  # in the other
        ([0.1, 0.6, 0.3, 0.3, 0.7], 300),  # in both
        ([0.1, 0.8, 0.1, 0.3, 0.7], 7),
    ]
    probabilities = torch.tensor([column for column, _ in columns]).T.reshape(5, 5, 1, 1)
    found = merge_heads(heads, probabilities, overlapping=False)
    assert found.flatten().tolist() == [wanted for _, wanted in columns]
    alone = merge_heads(heads[:1], probabilities[:3], overlapping=False)
    assert alone.flatten().tolist() == [0, 3, 0, 7, 7]


def test_joint_sigmoids_of_exclusive_targets_name_the_most_probable_above_one_half() -> None:
    (head,) = space_of("joint").heads_of("organs")
    columns = [([0.4, 0.5, 0.3], 0), ([0.6, 0.9, 0.8], 3), ([0.7, 0.6, 0.51], 7)]
    probabilities = torch.tensor([column for column, _ in columns]).T
    found = merge_heads([head], probabilities, overlapping=False)
    assert found.tolist() == [wanted for _, wanted in columns]


@pytest.mark.parametrize("split", [False, True])
def test_regions_are_painted_the_largest_first_even_across_parts(split: bool) -> None:
    space = space_of("per_dataset", max_targets=1 if split else 20)
    heads = space.heads_of("tumour")
    assert len(heads) == 1 + split
    probabilities = torch.tensor([[0.9, 0.9, 0.2, 0.4], [0.3, 0.8, 0.9, 0.1]])
    found = merge_heads(heads, probabilities, overlapping=True)
    assert found.tolist() == [1, 2, 2, 0]


def test_regions_are_painted_as_their_data_set_says() -> None:
    targets = (Target("whole", (1, 2), 2), Target("core", (2,), 1))
    head = Head("tumour", "tumour", targets, True)
    probabilities = torch.tensor([[0.9, 0.9], [0.1, 0.8]])
    assert merge_heads([head], probabilities, overlapping=True).tolist() == [2, 1]


def test_both_layouts_and_single_heads_run_on_the_same_trunk(rig_network: RigNetwork) -> None:
    space = space_of("joint")
    network = network_of(space)
    slopes, biases = [1.0, -1.0, 0.0, 1.0, -1.0], [-1.0, -1.0, -9.0, 0.0, 0.0]
    rig_network(network, {"joint": (slopes, biases)}, norms=False)
    image = noise(1, 5, 7, 9) * 2
    organs = predict_labels(predictor_of(network, space), image)
    expected = np.where(image[0] > 1, 7, np.where(image[0] < -1, 3, 0))
    np.testing.assert_array_equal(organs, expected)
    two = np.concatenate([image, noise(1, 5, 7, 9, seed=1)])
    tumour = predictor_of(network, space, "tumour")
    assert tumour.num_outputs == 2
    assert tumour.network.head_outputs == {"tumour": 2}
    np.testing.assert_array_equal(predict_labels(tumour, two), np.where(image[0] > 0, 1, 2))


def test_the_type_of_the_map_holds_the_largest_id() -> None:
    space = space_of("per_dataset")
    network = network_of(space)
    assert predict_labels(predictor_of(network, space), noise(1, 2, 2, 2)).dtype == np.uint16
    tumour = predictor_of(network, space, "tumour")
    assert predict_labels(tumour, noise(2, 2, 2, 2)).dtype == np.uint8


def test_an_output_that_is_not_finite_is_an_error() -> None:
    space = space_of("per_dataset")
    network = network_of(space)
    with torch.no_grad():
        for parameter in network.heads["organs"].parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        predict_labels(predictor_of(network, space), noise(1, 5, 6, 8))


def test_heads_of_two_data_sets_have_no_common_map() -> None:
    space = space_of("per_dataset")
    with pytest.raises(ValueError, match="one data set"):
        Predictor.build(
            network_of(space),
            space,
            heads=["organs", "tumour"],
            stem="organs",
            patch_size=(4, 4, 4),
            device=CPU,
        )
