"""What a person says of how tokens are chosen."""

from __future__ import annotations

import pytest

from client.text import Sampling
from protocol.errors import ConfigError


@pytest.mark.parametrize(("temperature", "samples"), [(0.0, False), (1e-300, False), (1e-6, False), (0.1, True)])
def test_a_temperature_that_is_as_good_as_none_takes_the_likeliest_token(temperature: float, samples: bool) -> None:
    """Scores divided by 1e-60 are infinite, and nothing can be drawn from these."""
    arguments = Sampling(temperature=temperature).arguments()
    assert arguments["do_sample"] is samples and ("temperature" in arguments) is samples


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_what_is_no_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="--temperature"):
        Sampling(temperature=temperature)
