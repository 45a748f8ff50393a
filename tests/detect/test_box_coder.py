import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.detect.box_coder import MAX_LOG_RATIO, decode, encode


def boxes_from(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand((8, 3), generator=generator, dtype=dtype) * 50
    return torch.cat([low, low + torch.rand((8, 3), generator=generator, dtype=dtype) * 30 + 1], 1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_decoding_an_encoded_box_gives_it_back(seed: int) -> None:
    boxes, anchors = boxes_from(seed), boxes_from(seed + 1)
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes, rtol=0, atol=1e-9)


def test_deltas_are_shift_in_anchor_sizes_then_log_of_the_ratio() -> None:
    anchor = torch.tensor([[0.0, 0, 0, 10, 20, 40]])
    box = torch.tensor([[5.0, 0, 0, 25, 20, 40]])
    expected = torch.tensor([[1.0, 0, 0, math.log(2), 0, 0]])
    torch.testing.assert_close(encode(box, anchor), expected)


def test_growth_is_limited_and_shrinking_is_not() -> None:
    anchor = torch.tensor([[0.0, 0, 0, 16, 16, 16]])
    grown = decode(torch.tensor([[0.0, 0, 0, 9, 9, 9]]), anchor)
    assert (grown[:, 3:] - grown[:, :3]).tolist()[0] == pytest.approx([1000] * 3, rel=1e-5)
    assert math.log(1000 / 16) == MAX_LOG_RATIO
    shrunk = decode(torch.tensor([[0.0, 0, 0, -9, -9, -9]]), anchor)
    assert (shrunk[0, 3] - shrunk[0, 0]).item() == pytest.approx(16 * math.exp(-9), rel=1e-2)


def test_bfloat16_deltas_are_decoded_in_float32() -> None:
    anchors = boxes_from(3, torch.float32)
    assert decode(torch.zeros((8, 6), dtype=torch.bfloat16), anchors).dtype == torch.float32


def test_no_boxes_give_no_deltas() -> None:
    none = torch.zeros((0, 6))
    assert encode(none, none).shape == decode(none, none).shape == (0, 6)


def test_gradients_pass_gradcheck() -> None:
    anchors = boxes_from(4)
    deltas = encode(boxes_from(5), anchors).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: decode(d, anchors), (deltas,))


def test_coder_equals_the_reference(boxops) -> None:
    golden = boxops("coder")
    anchors, targets = golden.boxes("anchors"), golden.boxes("targets")
    deltas, weights = golden.boxes("deltas"), golden.boxes("weights_w10_5").float()
    encoded = encode(targets, anchors)
    for computed, name in (
        (encoded, "encoded_w1"),
        (encoded * weights, "encoded_w10_5"),
        (decode(encoded, anchors), "decoded_back_w1"),
        (decode(deltas, anchors), "decoded_w1"),
        (decode(deltas / weights, anchors), "decoded_w10_5"),
    ):
        torch.testing.assert_close(computed, golden.boxes(name), rtol=1e-5, atol=1e-5)
    assert golden.number("clip") == MAX_LOG_RATIO
