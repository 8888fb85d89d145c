"""Errors about models."""

from tunery.errors import NotFound


class ModelNotFound(NotFound):
    """The model '{id}' does not exist or this project has no access to it.{suggestion} `GET /v1/models` lists the
    available models. An administrator adds a base with `tunery models add`, or makes this name an alias of one with
    `tunery models alias NAME MODEL`."""

    code = "model_not_found"


class ModelWithheld(ModelNotFound):
    """The model '{id}' is withheld: it failed the gate of its job '{job}' or the check of the served model. `GET
    /v1/fine_tuning/jobs/{job}` shows the failed checks; `POST /v1/fine_tuning/jobs/{job}/publish` with a reason
    publishes it anyway."""

    code = "model_withheld"
