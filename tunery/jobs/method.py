"""Reads the method of a request: its own options, and the hyperparameters that all methods share."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tunery import spec
from tunery.errors import InvalidValue
from tunery.field_errors import explain
from tunery.jobs.request import JobRequest, Method
from tunery.spec import Hyperparameters, MethodOptions, Part, Supervised

_Model = TypeVar("_Model", bound=BaseModel)


def read(request: JobRequest) -> tuple[MethodOptions, Hyperparameters]:
    """Returns the method and its hyperparameters, which old clients send at the top level.

    Raises Unsupported for an unknown method, InvalidValue for hyperparameters that are wrong or of another method.
    """
    if request.method is None:
        return Supervised(), request.hyperparameters or Hyperparameters()
    name = request.method.type
    kind = spec.find_method(name)
    for other in request.method.given.keys() - {name}:
        reason = f"'method.{other}' is set, but method.type is '{name}'."
        raise InvalidValue(param=f"method.{other}", reason=reason)
    options, inner = _under_its_name(request.method, kind)
    if inner is not None and request.hyperparameters is not None and inner != request.hyperparameters:
        reason = f"'hyperparameters' and 'method.{name}.hyperparameters' differ. Send only the second."
        raise InvalidValue(param="hyperparameters", reason=reason)
    return options, inner or request.hyperparameters or Hyperparameters()


def place(request: JobRequest, hyperparameter: str) -> str:
    """Returns the dotted path at which the request has a hyperparameter."""
    method = request.method
    folder = "" if method is None or method.given.get(method.type) is None else f"method.{method.type}."
    return f"{folder}hyperparameters.{hyperparameter}"


def _under_its_name(method: Method, kind: type[MethodOptions]) -> tuple[MethodOptions, Hyperparameters | None]:
    """Returns the options; and the shared hyperparameters, if the request has an object of the method's name."""
    given = method.given.get(method.type)
    if isinstance(given, Part):
        given = given.model_dump()
    body = {"method": {method.type: given}}
    knobs = {} if given is None else _validated(_Named, given, body, method.type).hyperparameters
    common = {name: value for name, value in knobs.items() if name in Hyperparameters.model_fields}
    place = (method.type, "hyperparameters")
    options = _validated(kind, {name: knobs[name] for name in knobs.keys() - common.keys()}, body, *place)
    return options, None if given is None else _validated(Hyperparameters, common, body, *place)


class _Named(Part):
    """The object that a plug-in's method has in a request."""

    hyperparameters: dict[str, Any] = {}


def _validated(kind: type[_Model], value: Any, body: dict[str, Any], *place: str) -> _Model:
    """Validates a value. Raises InvalidValue, naming the field by its `place` in the request's method."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", "method", *place, *fault["loc"])} for fault in error.errors()]
        raise explain(faults, body) from None
