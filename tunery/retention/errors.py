"""What can keep a project from being erased."""

from tunery.errors import TuneryError


class ProjectBusy(TuneryError):
    """The project is closed, but {attempts} of its runs have not ended yet. Run the command again in a few minutes."""

    code = "project_busy"


class WrongStorage(TuneryError):
    """None of the project's {files} files is in the storage. Set TUNERY_STORAGE_URL and the S3 credentials to the
    values that the API uses."""

    code = "wrong_storage"
