"""What can be wrong with stored objects."""

from tunery.errors import TuneryError, Unavailable


class StorageFailed(Unavailable):
    """Object storage could not {action} ({reason}). Nothing stored before was lost; look at the storage's health and
    free space, then try again."""

    code = "storage_failed"


class ChecksumMismatch(TuneryError):
    """'{key}' does not have the recorded sha256 ({expected}, found {found}). Restore it from a good copy."""

    code = "checksum_mismatch"


class ObjectMissing(TuneryError):
    """'{key}' is not in storage. Restore it from a copy, or delete what refers to it."""

    code = "object_missing"


class KeyTaken(TuneryError):
    """'{key}' is stored already and is not replaced."""

    code = "key_taken"
