"""Why an adapter that was trained elsewhere is refused."""

from tunery.errors import Rejected


class UnusableAdapter(Rejected):
    """The adapter '{source}' cannot be used: {reason}"""

    code = "unusable_adapter"
