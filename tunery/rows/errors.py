"""Errors about rows and chats."""

from tunery.errors import Rejected


class InvalidRows(Rejected):
    """Expected file to have {format} format. Row {line}: {reason}"""

    code = "invalid_rows"


class InvalidTable(InvalidRows):
    """Expected file to have {format} format. Line {line}: {reason}"""

    code = "invalid_rows"


class InvalidJSONL(InvalidRows):
    """Expected file to have JSONL format, where every line is a valid JSON dictionary. Line {line}: {reason}"""

    code = "invalid_jsonl"


class CannotRender(Rejected):
    """{reason}"""

    code = "cannot_render"


class PromptTooLong(Rejected):
    """This model's maximum context length is {limit} tokens, and your messages resulted in {tokens} tokens, which
    leaves no room for an answer. Please reduce the length of the messages."""

    code = "context_length_exceeded"
