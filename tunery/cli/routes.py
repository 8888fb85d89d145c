"""Names commands in place of the API's routes in messages for people.

The messages are the API's, whose other users send requests. A route stands in them between backticks.
"""

import re

_COMMANDS = (
    (r"GET /v1/fine_tuning/jobs/([^/]+)", r"tunery jobs show \1"),
    (r"GET /v1/fine_tuning/jobs/([^/]+)/logs", r"tunery jobs logs \1"),
    (r"GET /v1/fine_tuning/jobs/([^/]+)/checkpoints", r"tunery jobs checkpoints \1"),
    (r"POST /v1/fine_tuning/jobs/([^/]+)/rerun", r"tunery jobs rerun \1"),
    (r"POST /v1/fine_tuning/jobs/([^/]+)/publish", r"tunery jobs publish \1 --reason ..."),
    (r"GET /v1/models", "tunery models list"),
    (r"GET /v1/models/(.+)/capture", r"tunery captures show \1"),
    (r"POST /v1/models/(.+)/scorecards", r"tunery models score \1 FILE"),
    (r"GET /v1/models/(.+)", r"tunery models show \1"),
    (r"POST /v1/uploads", "client.uploads.upload_file_chunked"),  # of OpenAI's client: there is no command
)
_ROUTE = re.compile(r"`((?:GET|POST|DELETE) /[^`]*)`")


def as_commands(text: str) -> str:
    """Returns the text with the command in place of each route that has one."""
    return _ROUTE.sub(lambda found: f"`{_command(found[1])}`", text)


def _command(route: str) -> str:
    for pattern, command in _COMMANDS:
        if found := re.fullmatch(pattern, route):
            return found.expand(command)
    return route
