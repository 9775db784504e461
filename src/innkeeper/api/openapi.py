"""The OpenAPI document: FastAPI's own for its routes, and the hand-written ones put beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from innkeeper import __version__

REF = "#/components/schemas/{model}"
ERRORS = {
    "400": "invalid_request: the request is not valid",
    "401": "unauthorized: no token, or an unknown or revoked one",
    "403": "forbidden: the token's scopes do not allow this",
    "404": "The object does not exist, or belongs to another organization",
    "405": "method_not_allowed: see Allow",
    "409": "conflict or host_mismatch",
    "413": "payload_too_large",
    "429": "rate_limited: see Retry-After",
    "500": "internal_error: the message names the request id",
    "503": "service_unavailable, instance_not_ready or instance_failed: see Retry-After",
    "504": "provisioning_timeout: see Retry-After",
}
EVERYWHERE = [code for code in ERRORS if code != "504"]
METHODS = ("get", "put", "post", "delete", "patch", "head")


def ref(model: type[BaseModel]) -> dict[str, str]:
    """A reference to a model's schema."""
    return {"$ref": REF.format(model=model.__name__)}


def json_content(model: type[BaseModel]) -> dict[str, Any]:
    """The `content` of a JSON body."""
    return {"application/json": {"schema": ref(model)}}


def error_responses(model: type[BaseModel], codes: Iterable[str] = EVERYWHERE) -> dict[str, Any]:
    """The error answers of an operation, in a dialect's shape."""
    answers: dict[str, Any] = {}
    for code in codes:
        answer: dict[str, Any] = {"description": ERRORS[code], "content": json_content(model)}
        if code in ("429", "503", "504"):
            answer["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}
        answers[code] = answer
    return answers


def build_openapi(
    *,
    routes: Sequence[BaseRoute],
    error_models: Mapping[str, type[BaseModel]],
    invalid_models: Mapping[str, type[BaseModel]],
    security: Mapping[str, Sequence[Mapping[str, Sequence[str]]]],
    paths: Mapping[str, Mapping[str, Any]],
    models: Iterable[type[BaseModel]],
) -> dict[str, Any]:
    """The whole document.

    `error_models` and `security` are by path prefix, and so is `invalid_models`, where a request that is not valid is answered by 422.
    `paths` and `models` are the hand-written operations and what they refer to.
    """
    document = get_openapi(
        title="Innkeeper",
        version=__version__,
        routes=routes,
        description="Isolated guest computers for AI agents. Error codes are stable; every answer has an X-Request-Id.",
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, item in document["paths"].items():
        prefix = next(prefix for prefix in error_models if path.startswith(prefix))
        for method in METHODS:
            if method in item:
                item[method]["responses"].pop("422", None)
                item[method]["responses"].update(error_responses(error_models[prefix]))
                if prefix in invalid_models:
                    answer = {"description": "A field is not valid", "content": json_content(invalid_models[prefix])}
                    item[method]["responses"]["422"] = answer
                    item[method]["responses"]["504"] = error_responses(error_models[prefix], ["504"])["504"]
                    del item[method]["responses"]["400"]
                item[method]["security"] = list(security[prefix])
    document["paths"].update(paths)
    unique = dict.fromkeys([*models, *error_models.values(), *invalid_models.values()])
    _, definitions = models_json_schema([(model, "serialization") for model in unique], ref_template=REF)
    for name, schema in definitions["$defs"].items():
        if schemas.setdefault(name, schema) != schema:
            raise ValueError(f"two models are named {name}")
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer rk_live_...`"},
        "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    document["paths"] = dict(sorted(document["paths"].items()))
    return document
