"""Which card a device is, and what an hour of it costs."""

import pytest
from pydantic import ValidationError

from tunery.planning import cards, prices
from tunery.settings import Settings


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce GTX 1080", None),
        ("CPU", None),
        ("", None),
    ],
)
def test_a_device_is_known_by_the_words_of_its_name(device: str, card: str | None) -> None:
    found = cards.find(device)
    assert (found and found.name) == card


@pytest.mark.parametrize(
    ("own", "currency", "device", "hour"),
    [
        ({}, "USD", "NVIDIA H200", 4.5),
        ({"H200": 2.0}, "USD", "NVIDIA H200", 2.0),
        ({"H200": 0.0}, "USD", "NVIDIA H200", 0.0),
        ({"NVIDIA": 1.0, "NVIDIA H200": 3.0}, "USD", "NVIDIA H200", 3.0),
        ({"H100": 2.0}, "EUR", "NVIDIA H200", None),
        ({"H200": 2.0}, "EUR", "NVIDIA H200", 2.0),
        ({}, "USD", "CPU", None),
        ({"CPU": 0.1}, "USD", "CPU", 0.1),
        ({"": 9.0}, "USD", "NVIDIA H200", 4.5),
    ],
)
def test_the_operators_price_goes_before_the_tables(
    own: dict[str, float], currency: str, device: str, hour: float | None
) -> None:
    settings = Settings(gpu_hour_prices=own, currency=currency)
    assert prices.hourly(device, settings) == hour
    assert prices.cost(1800, device, settings) == (None if hour is None else hour / 2)


def test_no_price_is_negative() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Settings(gpu_hour_prices={"H200": -1})


@pytest.mark.parametrize(
    ("value", "kept", "said", "digits"),
    [
        (0.0, 0.0, "0.00", "0"),
        (1234.56789, 1234.5679, "1234.57", "1230"),
        (3.6, 3.6, "3.60", "3.6"),
        (0.0949, 0.0949, "0.095", "0.0949"),
        (0.09, 0.09, "0.09", "0.09"),
        (0.0004712, 0.000471, "0.00047", "0.000471"),
        (0.00001234, 0.0000123, "0.000012", "0.0000123"),
    ],
)
def test_a_small_price_is_not_shown_as_nothing(value: float, kept: float, said: str, digits: str) -> None:
    assert (prices.round_price(value), prices.say(value), prices.say_digits(value)) == (kept, said, digits)
