"""What the HTTP service makes of requests before any model sees them; tests/e2e/test_scoring_run.py asks the real service."""

import base64
import io
import struct

import numpy as np
import pytest
from fastapi import HTTPException
from PIL import Image

from serve.guard import token
from serve.scoring import Items, ServedRewards, api, decoded, opened

PICTURE = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def file(kind="PNG", **more):
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, kind, **more)
    return buffer.getvalue()


def test_a_png_is_read_exactly_and_a_jpeg_nearly():
    np.testing.assert_array_equal(opened(file(), 0, 35), PICTURE)
    assert opened(file("JPEG", quality=95), 0, 35).shape == PICTURE.shape


def test_a_phones_picture_is_turned_as_it_is_looked_at():
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    np.testing.assert_array_equal(opened(file(exif=turned), 0, 35), np.rot90(PICTURE, -1))


def test_tags_that_cannot_be_read_turn_nothing():
    np.testing.assert_array_equal(opened(file(exif=b"junk"), 0, 35), PICTURE)
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    text = struct.pack("<HHI4s", 0x011A, 2, 3, b"72")  # where a number belongs
    odd = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turned + text + bytes(4)
    np.testing.assert_array_equal(opened(file(exif=odd), 0, 35), PICTURE)


@pytest.mark.parametrize("broken", [b"", b"\x89PNG\r\n\x1a\n", file()[:-30], file("GIF"), file("BMP"), b"<svg/>"])
def test_what_is_no_whole_png_or_jpeg_is_refused(broken):
    with pytest.raises(HTTPException) as found:
        opened(broken, 3, 10**6)
    assert (found.value.status_code, found.value.detail) == (400, "picture 3 is no whole PNG or JPEG")


def test_a_picture_with_more_pixels_than_are_left_is_not_decoded():
    with pytest.raises(HTTPException) as found:
        opened(file()[:60], 0, 34)  # cut off behind its head
    assert found.value.status_code == 413


@pytest.mark.parametrize("size", [(9, 1), (8, 65)])
def test_what_is_as_good_as_a_line_is_not_decoded(size):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    with pytest.raises(HTTPException, match="at most 8 times as long as wide") as found:
        opened(buffer.getvalue()[:60], 0, 10**6)
    assert found.value.status_code == 400


def test_base64_with_and_without_the_head_of_a_data_url():
    text = base64.b64encode(file()).decode()
    assert decoded(text, 0) == decoded(f"data:image/png;base64,{text}", 0) == file()
    with pytest.raises(HTTPException, match=r"items\.2\.image is no base64"):
        decoded("not base64!", 2)


def settings(**more):
    reward = {"components": [{"name": "preference", "path": "shapes/reward", "weight": 1}]}
    return ServedRewards.model_validate({"reward": reward, **more})


def test_a_service_without_a_token_says_so_before_it_answers_anybody(tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWBP_TOKEN", raising=False)
    with pytest.raises(ValueError, match="the environment variable FLOWBP_TOKEN has no token for the reward service"):
        token(settings(), "reward service")
    assert token(settings(open=True), "reward service") is None
    (tmp_path / "token").write_text("secret\n")
    assert token(settings(token_file=str(tmp_path / "token")), "reward service") == "secret"
    monkeypatch.setenv("FLOWBP_TOKEN", "other")
    assert token(settings(), "reward service") == "other"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token(settings(token_file="~/token"), "reward service") == "secret"
    with pytest.raises(ValueError, match=r"the reward service's token_file .*/none cannot be read: No such file or directory"):
        token(settings(token_file=f"{tmp_path}/none"), "reward service")


def test_the_description_has_what_the_service_takes():
    body = api.openapi()["paths"]["/v1/score"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "image/png", "image/jpeg"}
    assert body["application/json"]["schema"]["properties"]["items"]["items"]["required"] == ["prompt", "image"]
    assert Items.model_validate({"items": [{"prompt": "p", "image": "i"}]}).items[0].prompt == "p"
