"""A form is parsed the same wherever its packets end, and whatever encoding its names have."""

import pytest

from api.multipart import Form, _Reader
from tunery.errors import InvalidValue

KIND = 'multipart/form-data; boundary="b-1"'
DATA = b"one\r\n--b-\r\n\r\n--b-2\r\n-\r\ntwo\r"
FORM = (
    b'--b-1\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--b-1\r\ncontent-disposition: form-data; name="file"; filename="a%22\xe9\xe2\x98\x83.jsonl"\r\n'
    b"content-type: text/plain\r\n\r\n" + DATA + b"\r\n--b-1--\r\n"
)


def read(form: bytes, size: int, kind: str = KIND) -> tuple[Form, bytes]:
    found = Form()
    reader = _Reader(kind, found, "file")
    for start in range(0, len(form), size):
        reader.write(form[start : start + size])
        reader.write(b"")
    reader.check_whole()
    return found, reader.next()


@pytest.mark.parametrize("size", [*range(1, 12), 2**20])
def test_form_is_the_same_wherever_packets_end(size: int) -> None:
    form, data = read(FORM, size)
    assert data == DATA
    assert form == Form({"purpose": "fine-tune"}, 'a"\ufffd\u2603.jsonl', len(DATA))


@pytest.mark.parametrize("cut", [1, 40, len(FORM) // 2, len(FORM) - 4])
def test_form_that_is_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(InvalidValue, match="cut off"):
        read(FORM[:cut], 7)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (FORM.replace(b"\r\n", b"\n"), "is invalid"),
        (FORM.replace(b"content-type:", b"x" * 5000 + b":"), "is invalid"),
        (FORM.replace(b"content-type: text/plain\r\n", b"x: y\r\n" * 100), "is invalid"),
        (FORM.replace(b"content-type: text/plain", b"content-length: 3"), "is invalid"),
        (FORM.replace(b"--b-1\r\ncontent", b"--b-1 \r\ncontent"), "is invalid"),
        (FORM.replace(b'name="file"', b'name="other"'), "Unknown file"),
        (b"x" * 2**20, "cut off"),
    ],
)
@pytest.mark.parametrize("size", [5, 2**20])
def test_broken_form_is_refused(form: bytes, words: str, size: int) -> None:
    with pytest.raises(InvalidValue, match=words):
        read(form, size)


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data", "multipart/form-data; boundary="])
def test_form_without_a_boundary_is_refused(kind: str) -> None:
    with pytest.raises(InvalidValue, match="multipart"):
        read(FORM, 2**20, kind)
