"""The codec: what goes in comes out, and nothing that was tampered with does."""

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from track4d_protocol import PROTOCOL_VERSION, codec
from track4d_protocol.errors import TransportError
from track4d_protocol.limits import Limits

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4), max_leaves=10)
bodies = st.dictionaries(st.text(max_size=10), values, max_size=5)
some_arrays = st.dictionaries(
    st.text("abcdefgh_0123", min_size=1, max_size=20),
    st.sampled_from(list(codec.DTYPES)).flatmap(
        lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))),
    max_size=4)


def assert_same(arrays, expected):
    assert list(arrays) == list(expected)
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()


@given(body=bodies, arrays=some_arrays)
def test_a_message_comes_back(body, arrays):
    frames = [bytes(frame) for frame in codec.encode("submit", body, arrays)]
    message = codec.decode(frames)
    assert message.kind == "submit" and message.body == body
    assert_same(message.arrays, arrays)


@settings(max_examples=50)
@given(body=bodies, arrays=some_arrays)
def test_a_file_comes_back_aligned(tmp_path_factory, body, arrays):
    path = tmp_path_factory.mktemp("codec") / "file"
    assert codec.write_file(path, body, arrays) == path.stat().st_size
    content = codec.read_file(bytearray(path.read_bytes()))
    assert content.body == body
    assert_same(content.arrays, arrays)
    assert all(array.flags.aligned and array.flags.writeable for array in content.arrays.values())
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@given(arrays=some_arrays, data=st.data())
def test_a_truncated_or_longer_frame_is_refused(arrays, data):
    frames = [bytes(frame) for frame in codec.encode("submit", {"a": 1}, arrays)]
    index = data.draw(st.integers(1, len(frames) - 1))
    change = data.draw(st.sampled_from(["cut", "grow", "drop", "repeat"]))
    if change == "cut" and frames[index]:
        frames[index] = frames[index][:-1]
    elif change == "drop":
        del frames[index]
    elif change == "repeat":
        frames.insert(index, frames[index])
    else:
        frames[index] += b"\0"
    with pytest.raises(TransportError) as caught:
        codec.decode(frames)
    assert caught.value.code == "bad_message"


@given(frames=st.lists(st.binary(max_size=40), max_size=4))
def test_anything_else_is_refused_not_crashed_on(frames):
    with pytest.raises(TransportError):
        codec.decode(frames)


@given(header=st.binary(max_size=60))
def test_any_header_is_decoded_or_refused(header):
    try:
        codec.decode([b"T4D" + bytes([PROTOCOL_VERSION]) + b"hello", header])
    except TransportError as error:
        assert error.code in ("bad_message", "too_large")


@given(data=st.data())
def test_a_cut_file_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("codec") / "file"
    codec.write_file(path, {"a": "b"}, {"x": np.arange(10), "y": np.zeros((2, 3), np.float32)})
    whole = path.read_bytes()
    with pytest.raises(TransportError):
        codec.read_file(whole[:data.draw(st.integers(0, len(whole) - 1))])


def declare(*arrays) -> list[bytes]:
    return [b"T4D" + bytes([PROTOCOL_VERSION]) + b"submit", msgpack.packb({"body": {}, "arrays": list(arrays)})]


@pytest.mark.parametrize("declaration", [
    ["x", "object", [1], 8], ["x", "float16", [4], 8], ["x", "complex64", [1], 8], ["x", "<U2", [1], 8],
    ["x", ["uint8"], [8], 8], ["x", "uint8", [7], 8], ["x", "uint8", [-8], 8], ["x", "uint8", [-2, -4], 8],
    ["x", "uint8", [8.0], 8], ["x", "uint8", [True], 8], ["x", "uint8", [8], "8"], ["x", "uint8", 8, 8],
    ["x", "uint8", [2**63, 2], 8], ["", "uint8", [8], 8], ["x" * 65, "uint8", [8], 8], [3, "uint8", [8], 8],
    ["x", "uint8", [8]], "x", ["x", "uint8", [1, 1, 1, 1, 1, 1, 8], 8],
])
def test_declarations_that_lie_are_refused(declaration):
    with pytest.raises(TransportError) as caught:
        codec.decode([*declare(declaration), b"12345678"])
    assert caught.value.code == "bad_message"


EIGHT = np.zeros(8, np.uint8)


@pytest.mark.parametrize("limits, arrays", [
    (Limits(frame_bytes=7), {"x": EIGHT}), (Limits(message_bytes=15), {"x": EIGHT, "y": EIGHT}),
    (Limits(arrays=1), {"x": EIGHT, "y": EIGHT}), (Limits(header_bytes=20), {"x": EIGHT})])
def test_limits_hold_on_both_sides(limits, arrays):
    with pytest.raises(TransportError) as sent:
        codec.encode("submit", {}, arrays, limits)
    with pytest.raises(TransportError) as received:
        codec.decode(codec.encode("submit", {}, arrays), limits)
    assert sent.value.code == received.value.code == "too_large"


def test_another_version_is_named():
    frames = codec.encode("hello", {})
    frames[0] = b"T4D" + bytes([PROTOCOL_VERSION + 1]) + b"hello"
    with pytest.raises(TransportError) as caught:
        codec.decode(frames)
    assert caught.value.code == "protocol_mismatch"
    assert all(f"version {version}" in caught.value.message for version in (PROTOCOL_VERSION, PROTOCOL_VERSION + 1))
    assert "add-on" in caught.value.action  # the older side is the one to update


def test_reports_with_numpy_numbers_travel_as_plain_ones():
    body = codec.decode(codec.encode("x", {"a": np.float32(0.5), "b": np.arange(3), "c": (1, 2)})).body
    assert body == {"a": 0.5, "b": [0, 1, 2], "c": [1, 2]}


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**70, {"x": lambda: 0}])
def test_other_values_are_refused_by_the_sender(value):
    with pytest.raises(TransportError) as caught:
        codec.encode("x", {"value": value})
    assert caught.value.code == "bad_message"


def test_views_and_foreign_byte_orders_travel():
    array = np.arange(24, dtype=">f4").reshape(4, 6)[::2, ::-1]
    back = codec.decode(codec.encode("x", {}, {"a": array})).arrays["a"]
    np.testing.assert_array_equal(back, array)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    codec.write_file(path, {"a": 1}, {})

    def fail() -> None:
        raise OSError("pulled out")

    with pytest.raises(OSError, match="pulled out"):
        codec.write_file(path, {"a": 2}, {"x": np.zeros(3)}, tick=fail)
    assert codec.read_file(path.read_bytes()).body == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
