"""What can be wrong with models."""

from tunery.errors import NotFound


class ModelNotFound(NotFound):
    """The model '{id}' does not exist or this project has no access to it.{suggestion} `GET /v1/models` lists what
    there is; an administrator adds a base with `tunery models add`."""

    code = "model_not_found"
