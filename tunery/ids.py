"""Ids as OpenAI spells them: a prefix that says the kind, and 24 random letters and digits (142 bits)."""

import secrets
import string

_ALPHABET = string.ascii_letters + string.digits


def token(length: int) -> str:
    """Returns `length` random letters and digits from the operating system's generator."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def new(prefix: str) -> str:
    """Returns a new, unguessable id: `new("ftjob-")`."""
    return prefix + token(24)


FILE = "file-"
REPORT = "report_"
FILE_EVENT = "fileevent-"
UPLOAD = "upload_"
PART = "part_"
JOB = "ftjob-"
EVENT = "ftevent-"
CHECKPOINT = "ftckpt_"
BASELINE = "ftbaseline-"
WEBHOOK_ENDPOINT = "we_"
WEBHOOK_EVENT = "evt_"
WEBHOOK_DELIVERY = "wh_"
PROJECT = "proj_"
KEY = "key_"
REQUEST = "req_"
COMPLETION = "chatcmpl-"
TEXT_COMPLETION = "cmpl-"
TOOL_CALL = "call_"
RESPONSE = "resp_"
MESSAGE = "msg_"
FUNCTION_CALL = "fc_"
