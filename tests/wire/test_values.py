import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayfed.wire.values import FORMATS, decode_values, encode_values, value_bytes

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def tensor(bits: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, np.uint32).view(np.float32).copy())


def through(x: torch.Tensor, format: str) -> torch.Tensor:
    data = bytes(encode_values(x, format, 1))
    assert data == encode_values(x.clone(), format, 1)
    assert len(data) == value_bytes(x.numel(), format)
    back = decode_values(memoryview(data), x.numel(), format)
    assert back.dtype == torch.float32
    assert back.shape == x.shape
    back += 0  # writable, and not the bytes' own memory
    return decode_values(data, x.numel(), format)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=600))
def test_fp32_keeps_every_bit_pattern(bits):
    back = through(tensor(bits), "fp32")
    assert back.numpy().view(np.uint32).tolist() == bits


def test_fp32_keeps_the_special_patterns():
    bits = [0x80000000, 0, 0x7FC00000, 0xFFC00001, 0x7F800001, 0x7F800000, 0xFF800000, 1, 0x80000001]
    assert through(tensor(bits), "fp32").numpy().view(np.uint32).tolist() == bits
    assert encode_values(torch.tensor([1.0]), "fp32") == b"\x00\x00\x80\x3f"  # little-endian


def nearest_half(v: float, format: str) -> float:
    """Round to nearest even by the definition, in exact arithmetic: fp16 has 11 significant bits, bf16 has 8."""
    digits, least, largest = (11, -24, 65504.0) if format == "fp16" else (8, -133, (2 - 2**-7) * 2.0**127)
    if v == 0:
        return v
    step = 2.0 ** max(math.frexp(v)[1] - digits, least)
    return math.copysign(min(abs(round(v / step) * step), largest), v)


@pytest.mark.parametrize("format", ["bf16", "fp16"])
@given(
    values=st.lists(
        st.one_of(FINITE, st.floats(-7e4, 7e4, width=32), st.floats(-(2**-13), 2**-13, width=32)), max_size=50
    )
)
def test_halves_round_to_nearest_even_and_saturate(format, values):
    back = through(torch.tensor(values, dtype=torch.float32), format).tolist()
    expected = [nearest_half(v, format) for v in values]
    assert back == expected
    assert [math.copysign(1, v) for v in back] == [math.copysign(1, v) for v in values]


@pytest.mark.parametrize(("format", "bound", "tiny"), [("bf16", 2**-8, 2**-134), ("fp16", 2**-11, 2**-25)])
def test_halves_keep_their_error_bound(format, bound, tiny):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=g) * 10 ** (4 * torch.rand(20_000, generator=g) - 5)
    error = (through(x, format).double() - x.double()).abs()
    assert (error <= (bound * x.double().abs()).clamp(min=tiny)).all()


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_halves_keep_infinities_and_write_one_nan(format):
    x = tensor([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF] * 9 + [0x7F7FFFFF, 0xFF7FFFFF])
    back = through(x, format)
    assert back[:2].tolist() == [math.inf, -math.inf]
    assert back[2:6].isnan().all()
    limit = torch.finfo(HALF[format]).max
    assert back[-2:].tolist() == [limit, -limit]
    halves = np.frombuffer(encode_values(x, format), np.uint16)[: 9 * 6].reshape(9, 6)
    assert len(np.unique(halves[:, 2:])) == 1  # in vector lanes and in the scalar tail alike


@given(st.lists(FINITE, max_size=600))
def test_int8_keeps_its_error_bound(values):
    x = torch.tensor(values, dtype=torch.float32)
    back = through(x, "int8")
    for block, decoded in zip(x.split(256), back.split(256), strict=True):
        if not block.numel():
            continue
        largest = block.abs().max().item()
        error = (block.double() - decoded.double()).abs().max().item()
        # half a level, and as much again as fp32 arithmetic and subnormal spacing can add
        assert error <= largest / 254 * (1 + 1e-4) + 2.0**-149
        assert decoded.abs().max().item() == largest  # the largest magnitude travels exactly


def test_int8_blocks_are_independent():
    x = torch.cat([torch.full((256,), 1e30), torch.linspace(-1e-3, 1e-3, 256), torch.zeros(256), torch.tensor([5.0])])
    back = through(x, "int8")
    assert back[:256].tolist() == x[:256].tolist()
    assert (back - x)[256:512].abs().max() <= 1e-3 / 253
    assert back[512:].tolist() == [0.0] * 256 + [5.0]
    tiny = torch.tensor([1e-45, -1e-45, 0.0])  # the least subnormal: 127 levels do not fit below it
    assert through(tiny, "int8").tolist() == tiny.tolist()


def test_int8_refuses_what_it_cannot_write():
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(300)
        x[299] = bad
        with pytest.raises(ValueError, match="int8"):
            encode_values(x, "int8")


@pytest.mark.parametrize("format", FORMATS)
def test_wrong_lengths_are_refused(format):
    assert through(torch.empty(0), format).numel() == 0
    data = bytes(encode_values(torch.ones(300), format, 1))
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ValueError, match="300 values"):
            decode_values(wrong, 300, format)


def test_unknown_formats_are_refused():
    for act in (lambda: encode_values(torch.ones(1), "fp8"), lambda: decode_values(b"", 0, "fp8")):
        with pytest.raises(ValueError, match="fp32, bf16, fp16, int8"):
            act()
