"""The settings of small data sets that are made without Ray."""

from data_prep.samples import SampleSettings

RECIPE = SampleSettings(
    stored_px=64,
    jpeg_quality=95,
    max_pixels=10**8,
    threshold=0.6,
    line_width=1,
    hed_sha256="0" * 64,
    hed_precision="fp32",
    hed_output="fused",
    hed_device="cpu",
    landmarks_sha256="1" * 64,
    face_search="as it was",
)
