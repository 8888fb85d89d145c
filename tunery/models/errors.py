"""What can be wrong with models."""

from tunery.errors import NotFound


class ModelNotFound(NotFound):
    """The model '{id}' does not exist or this project has no access to it.{suggestion} `GET /v1/models` lists what
    there is; an administrator adds a base with `tunery models add`."""

    code = "model_not_found"


class ModelWithheld(ModelNotFound):
    """The model '{id}' is withheld by the gate of its job '{job}', or by the check of the served model.
    `GET /v1/fine_tuning/jobs/{job}` shows what it failed; `POST /v1/fine_tuning/jobs/{job}/publish` with a reason
    publishes it all the same."""

    code = "model_withheld"
