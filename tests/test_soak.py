"""A minute of `benches.soak`: a server under twice its load, and clients good and bad."""

import random
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve")

from benches.soak import Case, Visitors, disagreements, growth_of, soak

SECONDS = 60.0


def test_a_minute_of_clients_good_and_bad(onnx_path: Path) -> None:
    line, wrong = soak(onnx_path, SECONDS)
    assert not wrong, "\n".join([line, *wrong[:20]])


def test_what_a_soak_notices() -> None:
    images = np.zeros((2, 1, 4, 4), np.float32)
    case = Case({"count": 2}, images, np.zeros((2, 4, 4, 1), np.uint8))
    visitors = Visitors(
        ("", 0), "model", [case], random.Random(0), 0.0, had=5, images=10, left=1, left_images=2
    )
    numbers = {
        'ddpm_requests_total{outcome="completed"}': 5.0,
        'ddpm_requests_total{outcome="cancelled"}': 1.0,
        'ddpm_requests_total{outcome="failed"}': 0.0,
        "ddpm_images_total": 10.0,
        'ddpm_request_seconds_count{route="/v1/samples"}': 5.0,
        'ddpm_http_answers_total{status="200"}': 5.0,
    }
    assert not list(disagreements(numbers, visitors))
    for name, value in (
        ('ddpm_requests_total{outcome="completed"}', 4.0),
        ('ddpm_requests_total{outcome="cancelled"}', 2.0),
        ('ddpm_requests_total{outcome="failed"}', 1.0),
        ("ddpm_images_total", 13.0),
        ('ddpm_request_seconds_count{route="/v1/samples"}', 6.0),
        ('ddpm_http_answers_total{status="500"}', 1.0),
    ):
        assert list(disagreements({**numbers, name: value}, visitors)), name
    warm, last = growth_of([50] * 4 + [100] * 4 + [110] * 4)
    assert (warm, last) == (100, 110)
