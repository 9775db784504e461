"""The hand-written operations of the Gentility dialect, described."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from innkeeper.api import sse
from innkeeper.api.dialects.gentility import public_files
from innkeeper.api.dialects.gentility.files import LIST_MAX
from innkeeper.api.dialects.gentility.room_path import ROOM
from innkeeper.api.dialects.gentility.schemas import (
    CommandAnswer,
    CommandRequest,
    DirectoryListing,
    ErrorAnswer,
    FileAnswer,
    FilesChangedPage,
    FileWritten,
    OutputPiece,
    RoomAnswer,
    RoomRequest,
    ToolsAnswer,
)
from innkeeper.api.openapi import ERRORS, error_responses, json_content
from innkeeper.api.utf8 import OUTPUT_MAX_BYTES

MODELS: tuple[type[BaseModel], ...] = (
    CommandAnswer,
    CommandRequest,
    DirectoryListing,
    ErrorAnswer,
    FileAnswer,
    FilesChangedPage,
    FileWritten,
    OutputPiece,
    RoomAnswer,
    RoomRequest,
    ToolsAnswer,
)
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_TEXT = {"type": "string"}
_UUID = {"type": "string", "format": "uuid"}
_PARAMETERS: dict[str, dict[str, Any]] = {
    "profile_id": {"description": "UUID of the profile.", "schema": _UUID},
    "room_id": {
        "description": "Any Unicode, 1-255 characters, percent-encoded as one segment (a slash as %2F).",
        "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    },
    "execution_id": {"description": "From a command's answer.", "schema": _UUID},
    "path": {"description": "The rest of the path, slashes included; percent-encoded bytes.", "schema": _TEXT},
    "instance_id": {"description": "From a room's or a command's answer.", "schema": _UUID},
}


def _operation(summary: str, template: str, name: str, **rest: Any) -> dict[str, Any]:
    found = [part[1:-1] for part in template.split("/") if part.startswith("{")]
    parameters = [{"name": p, "in": "path", "required": True, **_PARAMETERS[p]} for p in found]
    responses = rest.pop("responses")
    return {
        "tags": ["rooms"],
        "operationId": name,
        "summary": summary,
        "security": [{"bearer": []}],
        "parameters": parameters + rest.pop("parameters", []),
        "responses": {**responses, **error_responses(ErrorAnswer)},
        **rest,
    }


def _query(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


def _ok(model: type[BaseModel], text: str) -> dict[str, Any]:
    return {"description": text, "content": json_content(model)}


def _range_responses() -> dict[str, Any]:
    return {
        "206": {"description": "The range that was asked for.", "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}},
        "416": {"description": "The range lies outside the file; Content-Range has its size.", "content": json_content(ErrorAnswer)},
    }  # fmt: skip


def build_paths() -> dict[str, dict[str, Any]]:
    """The paths, by template."""
    command, file, files = f"{ROOM}/command", f"{ROOM}/file/{{path}}", f"{ROOM}/files/{{path}}"
    output = f"{command}/{{execution_id}}/output"
    changed = f"{command}/{{execution_id}}/files_changed"
    integer = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "default": 0}
    range_header = {
        "name": "Range",
        "in": "header",
        "required": False,
        "description": "One byte range.",
        "schema": _TEXT,
    }
    public = {
        "tags": ["public files"],
        "security": [],
        "parameters": [
            *({"name": p, "in": "path", "required": True, **_PARAMETERS[p]} for p in ("instance_id", "path")),
            range_header,
        ],
        "responses": {
            "200": {"description": "The file.", "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}},
            **_range_responses(),
            **error_responses(ErrorAnswer, ("404", "405", "429", "500", "503")),
        },
    }
    return {
        ROOM: {
            "post": _operation(
                "Create or retrieve a room",
                ROOM,
                "get_or_create_room",
                requestBody={"required": False, "content": json_content(RoomRequest)},
                responses={"200": _ok(RoomAnswer, "The room is ready.")},
            ),
            "delete": _operation(
                "Destroy a room, its files and its processes",
                ROOM,
                "destroy_room",
                responses={"204": {"description": "The guest no longer runs."}},
            ),
        },
        command: {
            "post": _operation(
                "Run a command; the room is made when it is missing",
                command,
                "run_command",
                requestBody={"required": True, "content": json_content(CommandRequest)},
                responses={
                    "200": {
                        "description": "The command ended, whatever its exit code. With `Accept: text/event-stream`: "
                        "the events `started`, `output`, then `result` (this same object) or `error`.",
                        "content": {**json_content(CommandAnswer), **sse.CONTENT},
                    }
                },
            )
        },
        output: {
            "get": _operation(
                "Read the kept output of a command",
                output,
                "read_output",
                parameters=[
                    _query("offset", "Byte offset.", integer),
                    _query("limit", "Bytes.", {"type": "integer", "minimum": 4, "maximum": OUTPUT_MAX_BYTES}),
                ],
                responses={"200": _ok(OutputPiece, "A piece of the output.")},
            )
        },
        changed: {
            "get": _operation(
                "Read all file changes of a command",
                changed,
                "read_files_changed",
                parameters=[_query("cursor", "`next_cursor` of the page before.", integer)],
                responses={"200": _ok(FilesChangedPage, "A page of at most 1,000 rows.")},
            )
        },
        file: {
            "get": _operation(
                "Read a file",
                file,
                "read_file",
                parameters=[
                    _query("raw", "1: the bytes themselves, streamed, any size.", {"type": "string", "enum": ["0", "1", "true", "false"]}),
                    range_header,
                ],
                responses={
                    "200": {"description": "The file.", "content": {**json_content(FileAnswer), "*/*": {"schema": {"type": "string", "format": "binary"}}}},
                    **_range_responses(),
                },
            ),
            "put": _operation(
                "Write a file atomically, parents made",
                file,
                "write_file",
                requestBody={"required": True, "content": _BINARY},
                responses={
                    "200": _ok(FileWritten, "The file was replaced."),
                    "201": _ok(FileWritten, "The file was created."),
                },
            ),
        },
        files: {
            "get": _operation(
                "List a directory",
                files,
                "list_files",
                parameters=[
                    _query("cursor", "`next_cursor` of the page before.", _TEXT),
                    _query("limit", "Rows.", {"type": "integer", "minimum": 1, "maximum": LIST_MAX, "default": LIST_MAX}),
                ],
                responses={"200": _ok(DirectoryListing, "A page, sorted by the names' bytes.")},
            )
        },
        f"{ROOM}/tools": {
            "get": _operation(
                "Function tools for a model",
                f"{ROOM}/tools",
                "describe_tools",
                responses={"200": _ok(ToolsAnswer, "The tools.")},
            )
        },
        public_files.TEMPLATE: {
            "get": {**public, "operationId": "read_public_file", "summary": "Read a public file"},
            "head": {
                **public,
                "operationId": "head_public_file",
                "summary": "Headers of a public file",
                "responses": {
                    "200": {"description": "The headers of the file."},
                    **{code: {"description": ERRORS[code]} for code in ("404", "405", "429", "500", "503")},
                },
            },
        },
    }  # fmt: skip
