"""Fetches the model server's measured rates."""

import httpx2

from tunery.serving import Rates
from tunery.settings import Settings

_SECONDS = 2


def fetch(settings: Settings) -> Rates | None:
    """Returns the rates since the model server started; None if it does not answer in time."""
    try:
        answer = httpx2.get(f"{settings.server_url}/v1/rates", timeout=_SECONDS, trust_env=False)
        return Rates.model_validate_json(answer.raise_for_status().content)
    except (httpx2.HTTPError, ValueError):
        return None
