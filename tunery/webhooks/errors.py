"""Errors about webhook endpoints."""

from tunery.errors import Rejected


class AddressRefused(Rejected):
    """Webhooks cannot be sent to {address}: {reason} Use an https URL with a public address, or ask the operator to
    name its network in TUNERY_WEBHOOK_ALLOW."""

    code = "address_refused"


class ReceiverSilent(Rejected):
    """The receiver sent no HTTP response: {reason}. Start it, or correct the endpoint's url, then test again."""

    code = "receiver_silent"
