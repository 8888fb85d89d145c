"""Errors about stored objects."""

from tunery.errors import TuneryError, Unavailable


class StorageFailed(Unavailable):
    """Object storage could not {action} ({reason}). Nothing that was already stored is lost. Check the storage's health
    and free space, then try again."""

    code = "storage_failed"


class StorageRefused(StorageFailed):
    """Object storage could not {action} ({reason}). Nothing that was already stored is lost. The operator has to
    change a setting: {advice}"""


class ChecksumMismatch(TuneryError):
    """'{key}' is damaged: its sha256 is {found}, not the recorded {expected}. Restore it from a backup."""

    code = "checksum_mismatch"


class ObjectMissing(TuneryError):
    """'{key}' is missing from storage. Restore it from a backup, or delete the object that refers to it."""

    code = "object_missing"


class KeyTaken(TuneryError):
    """'{key}' already exists in storage and is never overwritten."""

    code = "key_taken"
