"""What can keep a project from being erased."""

from tunery.errors import TuneryError


class ProjectBusy(TuneryError):
    """The project is closed, but {attempts} of its runs have not ended yet. Run the command again in some minutes."""

    code = "project_busy"


class WrongStorage(TuneryError):
    """None of the project's {files} files is in the storage. Set TUNERY_STORAGE_URL, and the S3 server's keys,
    as the API has them."""

    code = "wrong_storage"
