"""Numbers for the eye, read back."""

from __future__ import annotations

import re

import pytest

from moe_fast.wording import (
    format_count,
    format_numbers,
    format_quantity,
    format_range,
    format_runs,
)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([0, 1], "0-1"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"), ([2, 1], "2, 1")],
)
def test_ranges(numbers, text):
    assert format_runs(numbers) == text


def test_ranges_lose_nothing():
    for subset in range(2**10):
        numbers = [number for number in range(10) if subset >> number & 1]
        read = []
        for run in re.findall(r"\d+(?:-\d+)?", format_runs(numbers)):
            first, _, last = run.partition("-")
            read += range(int(first), int(last or first) + 1)
        assert read == numbers


def test_one_and_many():
    assert format_count(1, "file") == "1 file"
    assert format_count(0, "file") == "0 files"
    assert format_count(2, "file") == "2 files"
    assert format_numbers("layer", [3]) == "layer 3"
    assert format_numbers("layer", [0, 1, 2, 5]) == "layers 0-2, 5"
    assert format_range([0.5, 0.25, 0.125]) == "0.125 to 0.500"
    assert format_range([0.12344, 0.12341]) == "0.123"
    assert format_range([0.12344, 0.12341], 4) == "0.1234"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1_380_000_000, "1.38 GB"),
        (5 * 10**14, "500 TB"),
    ],
)
def test_compact(number, text):
    assert format_quantity(number, "B") == text
    assert format_quantity(number) == text.removesuffix("B").rstrip()
