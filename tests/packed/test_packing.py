"""Texts one after another: packing, padding, free rows, moving."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from lpt_fast.packing import PackedBatch, pack
from tests.tiny import batch, with_room

LENGTHS = [9, 4, 7, 1, 3]
STARTS = [0, 9, 13, 20, 21, 24]


def states(width=6):
    return torch.randn(5, 9, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_pack_and_pad(side):
    inputs, hidden = batch(side), states()
    mask = inputs["attention_mask"].bool()
    packed = pack(hidden, inputs["attention_mask"], input_ids=inputs["input_ids"], layer=2)
    lengths = LENGTHS if side != "none" else [9] * 5
    assert len(packed) == 5 and packed.max_seqlen == 9 and packed.num_tokens == sum(lengths)
    assert packed.lengths.tolist() == lengths and packed.cu_seqlens.dtype == torch.int32
    assert (packed.room, packed.layer, packed.identity) == (0, 2, None)
    padded, ids = packed.padded(), packed.pad(packed.input_ids, -7)
    assert packed.mask().sum(1).tolist() == lengths
    for b, n in enumerate(lengths):
        assert torch.equal(padded[b, :n], hidden[b][mask[b]])
        assert torch.equal(ids[b, :n], inputs["input_ids"][b][mask[b]])
        assert not padded[b, n:].any() and (ids[b, n:] == -7).all()
        assert packed.mask()[b].tolist() == [True] * n + [False] * (9 - n)
    if side != "left":
        again = pack(padded, packed.mask())
        assert torch.equal(again.hidden, packed.hidden)
        assert torch.equal(again.cu_seqlens, packed.cu_seqlens)


def test_without_a_mask_everything_is_text():
    packed = pack(states())
    assert packed.cu_seqlens.tolist() == [0, 9, 18, 27, 36, 45]
    assert torch.equal(packed.padded(), states()) and packed.mask().all()


@pytest.mark.parametrize("room", [1, 3])
def test_free_rows_are_left_out(room):
    plain = pack(states(), batch()["attention_mask"], input_ids=batch()["input_ids"])
    roomy = with_room(plain, room)
    assert len(roomy.hidden) == 24 + 5 * room and roomy.num_tokens == 24
    for b, start in enumerate(STARTS[:-1]):  # where the docstring says that a text stands
        at = start + (b + 1) * room
        assert torch.equal(roomy.hidden[at : at + LENGTHS[b]], plain.hidden[start : STARTS[b + 1]])
    assert torch.equal(roomy.text(), plain.hidden)
    assert torch.equal(roomy.padded(), plain.padded())
    assert torch.equal(roomy.pad(roomy.input_ids), plain.pad(plain.input_ids))


def test_gradients_flow_through_padding():
    hidden = states().requires_grad_()
    pack(hidden, batch()["attention_mask"]).padded().sum().backward()
    expected = batch()["attention_mask"][..., None].expand(-1, -1, 6)
    assert torch.equal(hidden.grad, expected.float())


def test_to():
    """A dtype goes to the states alone; a device to everything."""
    mask = batch()["attention_mask"]
    packed = pack(states(), mask, input_ids=batch()["input_ids"], identity="abc")
    half = packed.to(torch.bfloat16)
    assert half.hidden.dtype == torch.bfloat16 and packed.hidden.dtype == torch.float32
    assert half.input_ids.dtype == torch.int64 and half.cu_seqlens.dtype == torch.int32
    assert (half.identity, half.max_seqlen) == ("abc", 9)
    there = packed.to("meta", non_blocking=True)
    assert there.hidden.is_meta and there.cu_seqlens.is_meta and there.input_ids.is_meta
    assert there.token_type_ids is None and len(there) == 5


def test_goes_through_a_data_loader():
    packed = pack(states(), batch()["attention_mask"], input_ids=batch()["input_ids"])
    twin = pickle.loads(pickle.dumps(packed))
    assert torch.equal(twin.hidden, packed.hidden) and torch.equal(twin.input_ids, packed.input_ids)
    loader = torch.utils.data.DataLoader([0, 1], 2, collate_fn=lambda _: {"cached_hidden": packed})
    assert torch.equal(next(iter(loader))["cached_hidden"].hidden, packed.hidden)


def test_no_texts():
    packed = pack(torch.empty(0, 9, 6), torch.empty(0, 9))
    assert (len(packed), packed.num_tokens, packed.max_seqlen) == (0, 0, 0)
    assert packed.padded().shape == (0, 0, 6) and packed.mask().shape == (0, 0)


CU = torch.tensor([0, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedBatch(torch.ones(3), CU, 2), r"shape \[3\].*expected \[T \+ B room, D\]"),
        (lambda: PackedBatch(torch.ones(3, 4), CU[0], 2), r"`cu_seqlens` \[\], expected"),
        (lambda: PackedBatch(torch.ones(3, 4), CU, 2, room=2), r"\[3, 4\].*room = 2; pack\(\)"),
        (
            lambda: PackedBatch(torch.ones(3, 4), CU, 2, input_ids=torch.ones(2, 2)),
            r"`input_ids` has the shape \[2, 2\], expected \[3\].*leave out padding",
        ),
        (
            lambda: PackedBatch(torch.ones(5, 4), CU, 2, room=1, position_ids=torch.ones(5)),
            r"`position_ids` has the shape \[5\], expected \[3\]",
        ),
        (lambda: pack(torch.ones(3, 4)), r"`hidden` must have the shape \[B, S, D\], got \[3, 4\]"),
        (
            lambda: pack(torch.ones(2, 3, 4), torch.ones(2, 4)),
            r"`attention_mask` must have the shape \[2, 3\].*got \[2, 4\]",
        ),
        (
            lambda: pack(torch.ones(2, 3, 4), torch.tensor([[1, 0, 0], [0, 0, 0]])),
            "a row without a token, expected at least one",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_select():
    hidden, inputs = states(), batch()
    packed = pack(hidden, inputs["attention_mask"], input_ids=inputs["input_ids"], layer=2)
    for whole in (packed, replace(with_room(packed, 3), layer=2)):
        some = whole.select(torch.tensor([3, 0, 3]))
        assert some.lengths.tolist() == [1, 9, 1] and (some.room, some.layer) == (0, 2)
        assert some.max_seqlen == 9 and some.cu_seqlens.tolist() == [0, 1, 10, 11]
        assert torch.equal(some.padded()[1, :9], hidden[0])
        assert torch.equal(some.padded()[[0, 2], 0], hidden[[3, 3], 0])
        assert torch.equal(some.input_ids[1:10], inputs["input_ids"][0])
    assert len(packed.select(torch.tensor([], dtype=torch.int64))) == 0
