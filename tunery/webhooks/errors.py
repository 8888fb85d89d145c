"""What can be wrong with webhook endpoints."""

from tunery.errors import Rejected


class AddressRefused(Rejected):
    """Webhooks are not sent to {address}: {reason} Use an https URL with a public address, or ask the operator to name
    its network in TUNERY_WEBHOOK_ALLOW."""

    code = "address_refused"


class ReceiverSilent(Rejected):
    """The receiver gave no HTTP answer: {reason}. Start it, or correct the endpoint's url, then test again."""

    code = "receiver_silent"
