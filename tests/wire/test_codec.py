import struct
import zlib

import numpy as np
import pytest
import torch
from bit_flips import flipped
from hypothesis import given
from hypothesis import strategies as st

from rayfed.wire import HEADER_BYTES, decode, encode, inspect, keep_count, top_k
from rayfed.wire.codec import WireError
from rayfed.wire.indices import Coding
from rayfed.wire.qsgd import BITS
from rayfed.wire.values import FORMATS


def vector(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def payloads() -> dict[str, bytes]:
    """A small payload for each index coding and each value format."""
    x = vector(40)
    some = {"none": [], "gaps": [3, 7, 31], "bitmap": list(range(0, 40, 2)), "runs": list(range(5, 33))}
    made = {name: encode(x, indices=torch.tensor(chosen, dtype=torch.int64)) for name, chosen in some.items()}
    made["absent"] = encode(x, indices=torch.tensor([i for i in range(40) if i % 13]))
    made |= {f"dense {format}": encode(x, values=format, seed=1) for format in FORMATS}
    made |= {f"sparse {format}": encode(x, indices=torch.tensor([1, 20]), values=format, seed=1) for format in FORMATS}
    made["empty"] = encode(torch.empty(0))
    return made


PAYLOADS = payloads()


def resealed(data: bytes, field: int, value: int) -> bytes:
    """The payload with one header field changed and the checksum made right again."""
    fields = list(struct.unpack_from("<4sBBBIIIQ", data))
    fields[field] = value
    head = struct.pack("<4sBBBIIIQ", *fields)
    return head + struct.pack("<I", zlib.crc32(data[HEADER_BYTES:], zlib.crc32(head))) + data[HEADER_BYTES:]


@given(
    st.integers(0, 3000),
    st.one_of(st.none(), st.floats(0, 1)),
    st.sampled_from(FORMATS),
    st.integers(0, 2**32 - 1),
)
def test_round_trip(n, density, format, seed):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal(n, np.float32))
    indices = None if density is None else torch.from_numpy(np.flatnonzero(rng.random(n) < density))
    data = encode(x, indices=indices, values=format, seed=seed)
    assert data == encode(x.clone(), indices=indices, values=format, seed=seed)
    payload = decode(memoryview(data))
    sent = x if indices is None else x[indices]
    assert (payload.n, payload.count) == (n, sent.numel())
    if format == "fp32":
        assert torch.equal(payload.values, sent)
    elif format in BITS:
        assert sent.numel() == 0 or (payload.values - sent).abs().max() <= sent.abs().max() / (
            2 ** (BITS[format] - 1) - 1
        )
    else:
        torch.testing.assert_close(payload.values, sent, rtol=2**-8, atol=0.05 if format == "int8" else 1e-7)
    if payload.indices is None:
        assert indices is None or indices.numel() == n
    else:
        assert torch.equal(payload.indices, indices)
    expected = torch.zeros(n)
    expected[slice(None) if indices is None else indices] = payload.values
    dense = payload.dense()
    assert torch.equal(dense, expected)
    dense.add_(1)  # fresh and writable
    assert torch.equal(payload.dense(), expected)
    sizes = inspect(data)
    assert (sizes.n, sizes.count) == (n, sent.numel())
    assert sizes.bytes_header + sizes.bytes_indices + sizes.bytes_values == len(data)


def test_fp32_is_exact_to_the_bit():
    bits = np.array([0x80000000, 0x7FC00001, 0xFF800001, 0x7F800000, 1, 0x3F800000] * 50, np.uint32)
    x = torch.from_numpy(bits.view(np.float32).copy())
    assert (decode(encode(x)).dense().numpy().view(np.uint32) == bits).all()
    indices = torch.arange(0, 300, 7)
    assert (decode(encode(x, indices=indices)).values.numpy().view(np.uint32) == bits[::7]).all()


def test_every_entry_takes_no_index_bytes():
    x = vector(100)
    assert HEADER_BYTES <= 40
    assert len(encode(x)) == HEADER_BYTES + 400
    assert encode(x, indices=torch.arange(100)) == encode(x)
    assert len(encode(x, indices=torch.arange(0))) == HEADER_BYTES


def test_payload_bytes_are_pinned():
    """Payloads that exist must stay readable: a change here needs a new version number."""
    data = encode(torch.tensor([0.0, 1.5, 0.0, -2.0] + [0.0] * 96), indices=torch.tensor([1, 3]))
    head = b"rfed\x01\x00" + bytes([Coding.GAPS]) + struct.pack("<IIIQ", 100, 2, 3, 8)
    body = b"\x08\x00\x0a" + struct.pack("<ff", 1.5, -2.0)
    assert data == head + struct.pack("<I", zlib.crc32(head + body)) + body


def test_decoding_reads_read_only_memory_and_keeps_none_of_it():
    source = bytearray(encode(vector(50), indices=torch.arange(0, 50, 3)))
    payload = decode(memoryview(source).toreadonly())
    before = payload.dense()
    source[:] = bytes(len(source))
    assert torch.equal(payload.dense(), before)


@pytest.mark.parametrize("name", PAYLOADS)
def test_every_truncation_is_refused(name):
    data = PAYLOADS[name]
    for length in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:length])
        with pytest.raises(WireError):
            inspect(data[:length])


@pytest.mark.parametrize("most", [256, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_flipped_bit_is_refused(name, most):
    for bad in flipped(PAYLOADS[name], most):
        with pytest.raises(WireError):
            decode(bad)


@given(st.sampled_from(sorted(PAYLOADS)), st.data())
def test_damage_behind_a_right_checksum_raises_nothing_but_wire_errors(name, data):
    """The checksum is right but a header field is wrong: the sections are checked against each other."""
    payload = PAYLOADS[name]
    field = data.draw(st.integers(2, 7))
    small = st.integers(0, 60) if field >= 4 else st.integers(0, 7)
    wide = st.integers(0, (255, 255, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**64 - 1)[field - 2])
    bad = resealed(payload, field, data.draw(st.one_of(small, wide)))
    try:
        got = decode(bad)
    except WireError:
        return
    assert got.n < 2**31
    if got.indices is not None:
        assert got.indices.numel() == got.count
        assert not got.count or got.indices[-1] < got.n


@given(st.binary(max_size=200))
def test_noise_is_refused(noise):
    with pytest.raises(WireError):
        decode(noise)
    with pytest.raises(WireError):
        decode(PAYLOADS["gaps"][:7] + noise)


def test_refusals_say_what_is_wrong():
    data = PAYLOADS["gaps"]
    cases = {
        "too short": data[:10],
        "wrong magic": b"nope" + data[4:],
        "got format version 2, but this rayfed reads version 1": data[:4] + b"\x02" + data[5:],
        f"{len(data) - 1} bytes where the header announces {len(data)}": data[:-1],
        f"{len(data) + 1} bytes where the header announces {len(data)}": data + b"\0",
        "checksum": data[:-1] + bytes([data[-1] ^ 1]),
        "unknown value format": resealed(data, 2, len(FORMATS)),
        "unknown coding": resealed(data, 3, 6),
        "contradict its index coding": resealed(data, 3, Coding.ALL),
        "do not take": resealed(data, 5, 2),
        "beyond": resealed(data, 4, 30),
    }
    with pytest.raises(WireError, match="do not take"):
        inspect(resealed(data, 4, 2))  # three values of a vector of two
    for message, bad in cases.items():
        with pytest.raises(WireError, match=message) as refused:
            decode(bad)
        assert "\n" not in str(refused.value)


def test_encode_refuses_wrong_arguments():
    x = vector(10)
    for bad, message in [
        (lambda: encode(x.reshape(2, 5)), "flat float32"),
        (lambda: encode(x.double()), "flat float32"),
        (lambda: encode(x, values="fp8"), "formats are"),
        (lambda: encode(x, indices=torch.tensor([1, 1])), "rise strictly"),
        (lambda: encode(x, indices=torch.tensor([10])), "0 to 9"),
        (lambda: encode(x, indices=torch.tensor([1, 0], dtype=torch.uint8)), "int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()


def test_a_flasc_round_in_bytes():
    """What the paper's tables rest on: at density 1/4 a sparse payload is 28 % of the dense one, indices included."""
    x = vector(60_000)
    data = encode(x.requires_grad_(), indices=top_k(x, keep_count(60_000, 0.25)))
    assert inspect(data).count == 15_000
    assert 0.275 < len(data) / len(encode(x)) < 0.278
