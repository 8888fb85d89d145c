"""Errors about baselines."""

from tunery.errors import Rejected


class EndpointRefused(Rejected):
    """External endpoints at {address} are not allowed: {reason} Use an https URL with a public address, or ask the
    operator to name its network in TUNERY_EXTERNAL_ALLOW."""

    code = "endpoint_refused"
