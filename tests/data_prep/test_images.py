"""Images: any format becomes upright RGB; what cannot is refused with a reason."""

from __future__ import annotations

import base64
import contextlib
import io
import pickle
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from data_prep.files import SourceImage
from data_prep.images import (
    Decoded,
    ImageError,
    decode,
    decode_sketch,
    encode_jpeg,
    encode_sketch,
    fit,
)
from tests.data_prep.settings import read_listed

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    image = SourceImage("coffee", "train", "scene", "skimage/data/coffee.png", "bundled")
    return decode(read_listed(image, None)).pixels


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))  # of equal images: 138


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(photo: np.ndarray, orientation: int) -> None:
    upright = Image.fromarray(photo[:64, :96])
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    png = decode(saved(stored, "PNG", exif=exif))
    assert np.array_equal(png.pixels, photo[:64, :96])
    jpeg = decode(saved(stored, "JPEG", quality=95, exif=exif))
    assert psnr_db(jpeg.pixels, photo[:64, :96]) > 35
    assert (jpeg.width, jpeg.height, jpeg.plain_jpeg) == (96, 64, False)


def test_a_jpeg_with_iptc_is_not_plain(photo: np.ndarray) -> None:
    jpeg = saved(Image.fromarray(photo), "JPEG", quality=95)
    city = b"\x1c\x02\x5a\x00\x06Berlin"
    iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + len(city).to_bytes(4) + city
    segment = b"\xff\xed" + (len(iptc) + 2).to_bytes(2) + iptc
    plain = [decode(data) for data in (jpeg, jpeg[:2] + segment + jpeg[2:])]
    odd = decode(jpeg[:2] + b"\xff\xfe\0\3!" + segment + jpeg[2:])  # behind a comment of a byte
    assert [decoded.plain_jpeg for decoded in (*plain, odd)] == [True, False, False]
    assert np.array_equal(plain[0].pixels, plain[1].pixels)


def test_gray_palette_cmyk_and_16_bits_become_rgb(photo: np.ndarray) -> None:
    rgb = Image.fromarray(photo[:64, :64])
    gray = rgb.convert("L")
    repeated = np.repeat(np.asarray(gray)[:, :, None], 3, axis=2)
    assert np.array_equal(decode(saved(gray, "PNG")).pixels, repeated)
    assert psnr_db(decode(saved(gray, "JPEG", quality=95)).pixels, repeated) > 40
    palette = rgb.quantize(64)
    assert np.array_equal(decode(saved(palette, "PNG")).pixels, np.asarray(palette.convert("RGB")))
    # Pillow, like Photoshop, writes CMYK JPEGs inverted.
    assert (
        psnr_db(decode(saved(rgb.convert("CMYK"), "JPEG", quality=95)).pixels, photo[:64, :64]) > 30
    )
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode(saved(deep, kind)).pixels, repeated)


def test_16_bit_colors_keep_their_brightness(photo: np.ndarray) -> None:
    ok, encoded = cv2.imencode(".png", photo[:64, :64, ::-1].astype(np.uint16) * 257)
    assert ok
    assert np.array_equal(decode(encoded.tobytes()).pixels, photo[:64, :64])


@pytest.mark.parametrize(("background", "shown"), [("white", 255), ("black", 0)])
def test_the_transparent_value_of_16_bits_of_gray_shows_the_background(
    background: Literal["white", "black"], shown: int
) -> None:
    deep = np.full((8, 8), 40000, np.uint16)
    deep[:4] = 1234
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "PNG", transparency=1234)
    pixels = decode(file.getvalue(), background=background).pixels
    assert (pixels[:4] == shown).all()
    assert (pixels[4:] == round(40000 / 257)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_images_are_converted_band_by_band_as_they_would_be_whole(
    photo: np.ndarray, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = np.asarray(Image.fromarray(photo).convert("L")).astype(np.uint16) * 257 + 9
    image = Image.fromarray(deep if mode.startswith("I") else photo).convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    whole = decode(data := saved(image, "TIFF" if mode in ("CMYK", "I") else "PNG"))
    monkeypatch.setattr("data_prep.images.BAND_PIXELS", 600 * 7)
    assert np.array_equal(decode(data).pixels, whole.pixels)


def test_an_array_of_celeba_hq_is_an_image(photo: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, photo[None].transpose(0, 3, 1, 2))
    assert np.array_equal(decode(buffer.getvalue()).pixels, photo)
    with pytest.raises(ImageError, match="reading array data"):
        decode(buffer.getvalue()[:1000])
    np.save(buffer := io.BytesIO(), photo.astype(np.float32))
    with pytest.raises(ImageError, match=r"NPY of float32 \(400, 600, 3\)"):
        decode(buffer.getvalue())


def test_transparency_lies_on_white(photo: np.ndarray) -> None:
    alpha = np.zeros((64, 64, 1), np.uint8)
    alpha[:, :32] = 255
    image = Image.fromarray(np.concatenate([photo[:64, :64], alpha], axis=2))
    for kind in ("PNG", "WEBP"):
        pixels = decode(saved(image, kind, lossless=True)).pixels
        assert np.array_equal(pixels[:, :32], photo[:64, :32])
        assert (pixels[:, 32:] == 255).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image", "unknown_format"),
        (b"\xff\xd8\xff\xe0 no image either", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "unknown_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unknown_format"),
    ],
)
def test_what_is_no_image_says_so(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)  # an address would make manifests differ
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, str(again)) == (reason, str(caught.value))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_cut_short_is_damaged(photo: np.ndarray, kind: str) -> None:
    data = saved(Image.fromarray(photo), kind)
    with pytest.raises(ImageError) as caught:
        decode(data[: len(data) // 2])
    assert caught.value.reason == "damaged"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_with_a_hole_of_zeros_is_damaged(
    photo: np.ndarray, options: dict[str, Any], mode: str
) -> None:
    data = saved(Image.fromarray(photo).convert(mode), "JPEG", quality=95, **options)
    decode(data)
    reasons = []
    for at in range(4096, len(data) - 4096, max(4096, len(data) // 12)):
        try:
            decode(data[:at] + bytes(4096) + data[at + 4096 :])
        except ImageError as error:
            reasons.append(error.reason)
        else:
            reasons.append("by chance its bits end where the image does, so libjpeg is silent")
    assert len(reasons) > 8
    assert reasons.count("damaged") >= len(reasons) - 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_is_odd_and_whole_is_decoded(photo: np.ndarray, mode: str) -> None:
    image = Image.fromarray(photo).convert(mode)
    data = saved(image, "JPEG", quality=95)
    expected = decode(data).pixels
    restarts = saved(image, "JPEG", quality=95, restart_marker_rows=1)
    first = 4 + int.from_bytes(data[4:6])  # the end of the first segment
    odd = {
        "no end": data[:-2],
        "garbage behind": data + b"garbage" * 99,
        "zeros before the end": data[:-2] + bytes(300) + data[-2:],
        "filler before the end": data[:-2] + b"\xff" * 300 + data[-2:],
        "restarts": restarts,
        "restarts, no end": restarts[:-2],
        "bytes between segments": data[:first] + b"junk" + data[first:],
    }
    for name, changed in odd.items():
        assert psnr_db(decode(changed).pixels, expected) > 45, name


# What libjpeg-turbo's arithmetic coder writes for red = 8 x, green = 10 y, blue = 128; 32 x 24.
ARITHMETIC = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIs"
    "IxwcKDcpLDAxNDQ0Hyc5PTgyPC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIy"
    "MjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjL/yQARCAAYACADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIR"
    "AxEAPwD/ALtV+D5PdD6PUA4Q3rugIIoX5FFeY3rwb3jF1Sr7+F9UuiiRHp5CH7/GmI2fn3WTknEgqOycn7iyONe0"
    "O+HYX26jfbi0g9EGwCPRnmjra+D/2Q=="
)
ARITHMETIC_PROGRESSIVE = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIs"
    "IxwcKDcpLDAxNDQ0Hyc5PTgyPC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIy"
    "MjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjL/ygARCAAYACADASIAAhEBAxEB/8wABgAQARD/2gAMAwEAAhADEAAA"
    "Af8AdnS0kakFySniU9HxjpXOfY8017pgcP/MAAQQBf/aAAgBAQABBQIS++pHgknVQP/MAAQRBf/aAAgBAwEBPwEV"
    "DzIVMAYg/8wABBEF/9oACAECAQE/AUq6ixncjMz/zAAEEAX/2gAIAQEABj8CwP/MAAQQBf/aAAgBAQABPyHTQF3P"
    "GmD/2gAMAwEAAgADAAAAECa4sP/MAAQRBf/aAAgBAwEBPxAjDQos/8wABBEF/9oACAECAQE/ENMqUf/MAAQQBf/a"
    "AAgBAQABPxCqMuNFI7T/2Q=="
)


@pytest.mark.parametrize("encoded", [ARITHMETIC, ARITHMETIC_PROGRESSIVE])
def test_a_jpeg_with_arithmetic_coding_is_decoded_and_damaged_where_cut(encoded: str) -> None:
    data = base64.b64decode(encoded)
    y, x = np.mgrid[:24, :32]
    expected = np.stack([8 * x, 10 * y, np.full_like(x, 128)], axis=-1).astype(np.uint8)
    assert psnr_db(decode(data).pixels, expected) > 35
    assert psnr_db(decode(data + b"garbage").pixels, expected) > 35
    with pytest.raises(ImageError) as caught:
        decode(data[: len(data) * 3 // 4])
    assert caught.value.reason == "damaged"


def test_a_damaged_color_profile_damages_no_pixel(photo: np.ndarray) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = saved(Image.fromarray(photo), "JPEG", quality=95, icc_profile=profile)
    at = data.index(b"ICC_PROFILE\0") + 12  # the number of this part, then how many there are
    for damaged in (data[:at] + b"\7" + data[at + 1 :], data[:at] + b"\0\0" + data[at + 2 :]):
        assert np.array_equal(decode(damaged).pixels, decode(data).pixels)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_tiffs_of_either_byte_order_are_scaled_by_their_range(order: str) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    mode = "I;16" if order == "<u2" else "I;16B"
    image = Image.frombytes(mode, (64, 64), values.astype(order).tobytes())
    pixels = decode(saved(image, "TIFF")).pixels
    assert np.abs(pixels[..., 0] - values / 257).max() < 1
    signed = TiffImagePlugin.ImageFileDirectory_v2()
    signed[258], signed[339] = 16, 2
    half = Image.frombytes("I;16", (64, 64), (values / 2).astype("<u2").tobytes())
    pixels = decode(saved(half, "TIFF", tiffinfo=signed)).pixels
    assert np.abs(pixels[..., 0] - values / 257).max() < 1


def test_a_progressive_jpeg_that_is_cut_short_is_damaged(photo: np.ndarray) -> None:
    """Its missing scans would only make it blurred, and libjpeg does not mention them."""
    data = saved(Image.fromarray(photo), "JPEG", quality=95, progressive=True)
    with pytest.raises(ImageError) as raised:
        decode(data[: 2 * len(data) // 3])
    assert raised.value.reason == "damaged"


def test_a_deep_image_is_scaled_by_what_it_says_it_holds(photo: np.ndarray) -> None:
    gray = np.asarray(Image.fromarray(photo).convert("L"))
    twelve = (gray.astype(np.uint32) * 4095 // 255).astype(np.uint16)
    stated = TiffImagePlugin.ImageFileDirectory_v2()
    stated[281] = 4095
    stated_255 = TiffImagePlugin.ImageFileDirectory_v2()
    stated_255[281] = 255
    for image, tags in (
        (Image.fromarray(twelve), stated),
        (Image.fromarray(gray.astype(np.int32)), stated_255),
    ):
        pixels = decode(saved(image, "TIFF", tiffinfo=tags)).pixels
        assert np.abs(pixels[..., 0].astype(int) - gray).max() <= 1


def test_a_deep_image_that_would_come_out_nearly_black_is_refused(photo: np.ndarray) -> None:
    gray = np.asarray(Image.fromarray(photo).convert("L"))
    twelve = (gray.astype(np.uint32) * 4095 // 255).astype(np.uint16)
    _, colors = cv2.imencode(".png", photo.astype(np.uint16) * 15)
    _, floats = cv2.imencode(".tiff", gray.astype(np.float32) / 255)
    for data in (
        saved(Image.fromarray(twelve), "PNG"),
        saved(Image.fromarray(twelve), "TIFF"),
        saved(Image.fromarray(gray.astype(np.int32)), "TIFF"),
        colors.tobytes(),
        floats.tobytes(),
    ):
        with pytest.raises(ImageError) as caught:
            decode(data)
        assert caught.value.reason == "unsupported_mode"


@pytest.mark.slow
def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    huge = saved(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(huge) < 60_000
    with pytest.raises(ImageError, match="400000000 pixels") as caught:
        decode(huge)
    assert caught.value.reason == "too_many_pixels"
    jpeg = saved(Image.new("L", (100, 101)), "JPEG")
    with pytest.raises(ImageError, match="100 x 101 pixels: more than the limit of 10000"):
        decode(jpeg, max_pixels=10_000)


def test_what_is_halved_or_more_looks_as_after_full_decoding(photo: np.ndarray) -> None:
    sizes = {(1200, 800): (600, 400), (1201, 800): (1201, 800), (600, 400): (600, 400)}
    for (width, height), (decoded_width, decoded_height) in sizes.items():
        data = encode_jpeg(cv2.resize(photo, (width, height)), 90)
        quick = decode(data, enough_px=2 * 128)
        assert quick.pixels.shape == (decoded_height, decoded_width, 3)
        assert (quick.width, quick.height) == (width, height)
        assert psnr_db(fit(quick, 128), fit(decode(data), 128)) >= 41
        assert np.array_equal(decode(data, enough_px=801).pixels, decode(data).pixels)


def test_real_images_that_are_halved_or_more_look_as_after_full_decoding(
    photographs: Path,
) -> None:
    files = [*(photographs / "odd").glob("*.jp*g"), *(photographs / "scenes").glob("*.jpg")]
    compared = 0
    for path in files:
        with contextlib.suppress(ImageError):
            whole = decode(data := path.read_bytes())
            if 2 * 128 <= min(whole.width, whole.height) < 1000:
                quick = fit(decode(data, enough_px=2 * 128), 128)
                assert psnr_db(quick, fit(whole, 128)) >= 38, path.name
                compared += 1
    assert compared > 200


def test_exact_halves_are_the_mean_of_four_pixels(photo: np.ndarray) -> None:
    odd = photo[:398, :510]
    for pixels, short_px in ((photo, 200), (odd, 199)):
        deep = pixels.astype(np.uint16)
        rows = deep[::2] + deep[1::2]
        mean = (rows[:, ::2] + rows[:, 1::2] + 2) // 4
        height, width = pixels.shape[:2]
        assert np.array_equal(fit(Decoded(pixels, width, height), short_px), mean)


def test_the_short_side_is_fitted_and_the_aspect_ratio_kept(photo: np.ndarray) -> None:
    image = Decoded(photo, width=600, height=400)
    assert fit(image, 100).shape == (100, 150, 3)
    assert fit(image.cropped((10, 20, 110, 320)), 50).shape == (150, 50, 3)
    assert np.array_equal(fit(image, 400), photo)
    with pytest.raises(ImageError, match="600 x 400 pixels: the short side is under 401"):
        fit(image, 401)
    strip = np.zeros((10, 163, 3), np.uint8)
    assert fit(Decoded(strip[:, :160], 160, 10), 8).shape == (8, 128, 3)
    with pytest.raises(ImageError, match="163 x 10 pixels: longer than 16 times the short side"):
        fit(Decoded(strip, 163, 10), 8)
    with pytest.raises(ImageError, match="crop"):
        image.cropped((0, 0, 601, 10))


def test_a_sketch_reads_back_in_mode_l_as_0_and_255() -> None:
    strokes = np.random.default_rng(0).integers(0, 2, (33, 47)).astype(np.uint8)
    data = encode_sketch(strokes)
    image = Image.open(io.BytesIO(data))
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), strokes * 255)
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert decoded is not None
    assert np.array_equal(decoded, strokes * 255)
    assert encode_sketch(strokes) == data
    assert np.array_equal(decode_sketch(data), strokes)


@pytest.mark.parametrize(
    "options",
    [[], [cv2.IMWRITE_PNG_BILEVEL, 1], [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]],
    ids=["row filters", "one bit", "runs"],
)
def test_a_sketch_that_another_program_wrote_is_read_too(options: list[int]) -> None:
    gray = np.random.default_rng(0).integers(0, 2, (300, 400)).astype(np.uint8) * 255
    data = cv2.imencode(".png", gray, options)[1].tobytes()
    assert np.array_equal(decode_sketch(data), gray // 255)


@pytest.mark.parametrize("cut", [0, 20, 45, 60])
def test_a_sketch_cut_short_is_damaged(cut: int) -> None:
    data = encode_sketch(np.eye(64, dtype=np.uint8))
    with pytest.raises(ImageError) as raised:
        decode_sketch(data[:cut] + bytes(len(data) - cut) if cut else b"")
    assert raised.value.reason == "damaged"


REFUSED = {
    "pillow_16bit.cropped.tif": "unsupported_mode",  # dark: 12 bits, or a dark image
    "pillow_hopper_bad_exif.jpg": "damaged",  # its scan is torn: stripes are missing
    "pillow_broken_data_stream.png": "damaged",
    "pillow_truncated_end_chunk.png": "damaged",
    "pillow_truncated_image.png": "damaged",
    "pillow_truncated_jpeg.jpg": "damaged",
}


def test_the_awkward_images_decode_or_say_why(photographs: Path) -> None:
    refused = {}
    upright = {}
    for path in sorted((photographs / "odd").iterdir()):
        try:
            image = decode(path.read_bytes())
        except ImageError as error:
            refused[path.name] = error.reason
            continue
        assert image.pixels.shape == (image.height, image.width, 3)
        upright[path.name] = fit(image, min(25, image.height, image.width))
    assert refused == REFUSED
    landscapes = [upright[f"exif_landscape_{n}.jpg"].astype(float) for n in range(2, 9)]
    assert all(np.abs(other - landscapes[0]).mean() < 8 for other in landscapes)
    for name in ("pillow_pil_sample_cmyk.jpg", "pillow_tiff_strip_cmyk_jpeg.tif"):
        red, green, blue = upright[name][0, 0].tolist()
        assert red > 200
        assert max(green, blue) < 60
