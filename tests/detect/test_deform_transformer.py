"""The deformable transformer: axis order, sampling locations, proposals, refinement, counts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import PLAIN_SMALL
from voxelbridge.detect.deform_transformer import (
    DecoderBlock,
    DeformableAttention,
    DeformableTransformer,
    EncoderBlock,
    head_directions,
    proposal_boxes,
    refine,
    sampling_locations,
)
from voxelbridge.detect.deformable_detr import (
    BoxHead,
    ChannelMapper,
    DeformableDETR,
    initialize_transformer,
)
from voxelbridge.detect.sine_encoding import cell_centres, encode_cells, sine_features

SHAPES = [(4, 6, 8), (2, 3, 4)]  # non-cubic, so that a swapped axis shows


def small_transformer(*, queries: int = 5, classes: int = 2) -> DeformableTransformer:
    sizes = {"heads": 4, "levels": 2, "points": 2, "hidden": 32}
    return DeformableTransformer(
        [EncoderBlock(16, **sizes)],
        [DecoderBlock(16, **sizes) for _ in range(2)],
        [nn.Linear(16, classes) for _ in range(3)],
        [BoxHead(16) for _ in range(3)],
        width=16,
        levels=2,
        queries=queries,
    )


def small_detr() -> DeformableDETR:
    torch.manual_seed(0)
    encoder = build_encoder(PLAIN_SMALL, in_channels=1)
    projection = ChannelMapper(encoder.channels[-2:], 16)
    transformer = small_transformer()
    initialize_transformer(projection, transformer, class_prior=0.05, zero_box_heads=True)
    return DeformableDETR(encoder, projection, transformer, levels=(2, 3))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_attention_reads_the_coordinate_of_its_reference_along_each_axis(axis: int) -> None:
    # Memory holds the z, y or x of each cell; attention without offsets must read it back.
    attention = DeformableAttention(4, heads=1, levels=2, points=1)
    attention.reset_parameters()
    for layer in (attention.offsets, attention.weights):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer in (attention.value, attention.output):
        nn.init.eye_(layer.weight)
    centres = torch.cat([cell_centres(shape, device=torch.device("cpu")) for shape in SHAPES])
    memory = centres[None, :, axis, None].expand(-1, -1, 4)
    references = torch.rand(1, 20, 3, generator=torch.Generator().manual_seed(axis)) * 0.4 + 0.3
    read = attention(torch.zeros(1, 20, 4), references, memory, SHAPES)
    torch.testing.assert_close(read[0, :, 0], references[0, :, axis])


def test_tokens_and_their_encodings_are_in_c_order_of_z_y_x() -> None:
    centres = cell_centres((2, 3, 4), device=torch.device("cpu")).view(2, 3, 4, 3)
    assert centres[1, 0, 0].tolist() == pytest.approx([0.75, 1 / 6, 0.125])
    assert centres[0, 2, 0].tolist() == pytest.approx([0.25, 5 / 6, 0.125])
    codes = encode_cells((2, 3, 4), 32, device=torch.device("cpu")).view(2, 3, 4, 32)
    assert torch.equal(codes[1, 1, 1, :10], codes[1, 2, 3, :10])  # z's share
    assert not torch.equal(codes[0, 1, 1, :10], codes[1, 1, 1, :10])
    assert torch.equal(codes[0, 1, 1, 10:20], codes[1, 1, 3, 10:20])  # y's share
    assert torch.equal(codes[0, 0, 1, 20:30], codes[1, 2, 1, 20:30])  # x's share
    assert (codes[..., 30:] == 0).all()


def test_sine_features_are_interleaved_sines_and_cosines() -> None:
    got = sine_features(torch.tensor([0.25]), 4)[0]
    quarter = np.pi / 2
    expected = [np.sin(quarter), np.cos(quarter), np.sin(quarter / 100), np.cos(quarter / 100)]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


def test_sampling_locations_are_the_golden_ones(shared: Path) -> None:
    golden = dict(np.load(shared / "golden" / "msda" / "m01_sampling_locations.npz"))
    offsets = torch.tensor(golden["offsets"]).flip(-1)  # theirs are x, y, z
    shapes = [(int(d), int(h), int(w)) for d, h, w in golden["spatial_shapes"]]
    for key, reference in (("points", "reference_points"), ("boxes", "reference_boxes")):
        # The peer gives one reference per level; all levels see the same patch here.
        given = torch.tensor(golden[reference])
        for level in range(len(shapes)):
            ours = given[:, :, level]
            ours = torch.cat([ours[..., :3].flip(-1), ours[..., 3:].flip(-1)], dim=-1)
            got = sampling_locations(ours, offsets, shapes)[:, :, :, level].flip(-1)
            expected = golden[f"sampling_locations_from_{key}"][:, :, :, level]
            np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("heads", [3, 4, 6, 8, 14, 16, 26])
def test_head_directions_differ_and_reach_the_cube(heads: int) -> None:
    directions = head_directions(heads)
    assert directions.shape == (heads, 3)
    torch.testing.assert_close(directions.abs().amax(dim=1), torch.ones(heads))
    assert len({tuple(round(float(v), 4) for v in row) for row in directions}) == heads
    if heads == 8:
        assert (directions.abs() == 1).all()


def test_point_p_starts_p_plus_one_cells_away() -> None:
    attention = DeformableAttention(16, heads=8, levels=2, points=3)
    attention.reset_parameters()
    bias = attention.offsets.bias.view(8, 2, 3, 3)
    for point in range(3):
        assert (bias[:, :, point].abs() == point + 1).all()


def test_proposals_near_the_border_are_not_valid() -> None:
    boxes, valid = proposal_boxes([(100, 100, 100), (1, 1, 1)], device=torch.device("cpu"))
    grid = valid[:-1].view(100, 100, 100)
    assert not grid[0].any()  # its centre is 0.005 from the border
    assert grid[1:99, 1:99, 1:99].all()
    assert boxes[50 * 10_000 + 50 * 100 + 20].tolist() == pytest.approx(
        [0.505, 0.505, 0.205, 0.05, 0.05, 0.05]
    )
    assert boxes[-1].tolist() == pytest.approx([0.5, 0.5, 0.5, 0.1, 0.1, 0.1])


def test_refining_by_zero_keeps_the_box_and_carries_the_gradient_of_the_delta_alone() -> None:
    boxes = torch.tensor([[0.2, 0.5, 0.9, 0.1, 0.3, 0.6]])
    deltas = torch.zeros(1, 6, requires_grad=True)
    refined = refine(deltas, boxes)
    torch.testing.assert_close(refined, boxes)
    refined.sum().backward()
    torch.testing.assert_close(deltas.grad, boxes * (1 - boxes))
    assert (
        refine(torch.zeros(1, 6), torch.tensor([[0.0, 1.0, 0.5, 0.5, 0.5, 0.5]])).isfinite().all()
    )


def test_output_has_a_stage_per_block_and_queries_as_planned() -> None:
    model = small_detr()
    output = model(torch.randn(2, 1, 16, 24, 32))
    assert len(output.blocks) == 2
    for stage in output.blocks:
        assert stage.logits.shape == (2, 5, 2)
        assert stage.boxes.shape == (2, 5, 6)
        assert ((stage.boxes > 0) & (stage.boxes < 1)).all()
    cells = 4 * 6 * 8 + 2 * 3 * 4
    assert output.proposals.boxes.shape == (2, cells, 6)
    assert output.valid.shape == (cells,)


def test_more_queries_than_cells_take_all_cells() -> None:
    transformer = small_transformer(queries=500)
    initialize_transformer(
        ChannelMapper([16], 16), transformer, class_prior=0.05, zero_box_heads=True
    )
    output = transformer([torch.randn(1, 16, *shape) for shape in SHAPES])
    assert output.blocks[-1].boxes.shape == (1, 216, 6)


def test_candidates_are_in_voxels_of_a_non_cubic_patch() -> None:
    model = small_detr().eval()
    with torch.no_grad():
        image = torch.randn(1, 1, 16, 24, 32)
        boxes, probabilities = model.candidates(image)[0]
        answer = model(image).blocks[-1].boxes[0]
    extent = torch.tensor([16.0, 24.0, 32.0])
    torch.testing.assert_close((boxes[:, :3] + boxes[:, 3:]) / 2, answer[:, :3] * extent)
    torch.testing.assert_close(boxes[:, 3:] - boxes[:, :3], answer[:, 3:] * extent)
    assert probabilities.shape == (5, 2)
    assert 0 < float(probabilities.min()) < float(probabilities.max()) < 0.5


def test_every_parameter_gets_a_gradient() -> None:
    model = small_detr()
    output = model(torch.randn(1, 1, 16, 16, 16))
    stages = [*output.blocks, output.proposals]
    torch.stack([s.logits.sum() + s.boxes.square().sum() for s in stages]).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
