"""Errors about API keys."""

from tunery.errors import TuneryError


class Unauthenticated(TuneryError):
    """{reason} Send a project's key as 'Authorization: Bearer <key>'; `tunery keys create` makes one."""

    code = "invalid_api_key"


class Forbidden(TuneryError):
    """This key may not {action}. Use an administrator's key (`tunery keys create --admin`)."""

    code = "forbidden"
