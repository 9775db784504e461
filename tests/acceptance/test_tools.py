"""`GET .../tools`: schemas that a model can be given as they are."""

from __future__ import annotations

import jsonschema_rs
from server_fixture import Api, Room

SAFE_NAME = r"^[a-zA-Z0-9_-]{1,64}$"


def test_the_answer_is_usable_as_function_tools(shared: Room) -> None:
    made = shared.create()
    answer = shared.client.get(f"{shared.path}/tools").json()
    assert set(answer) == {"profile_id", "room_id", "instance_id", "instance_status", "tools"}
    assert (answer["profile_id"], answer["room_id"]) == (shared.profile_id, shared.room_id)
    assert (answer["instance_id"], answer["instance_status"]) == (made["instance_id"], "ready")
    assert [tool["name"] for tool in answer["tools"]] == ["execute", "read_file", "write_file"]
    for tool in answer["tools"]:
        assert set(tool) == {"name", "description", "parameters"} and len(tool["description"]) > 20
        schema = tool["parameters"]
        jsonschema_rs.meta.validate(schema)
        assert (schema["type"], schema["additionalProperties"]) == ("object", False)
        assert set(schema["required"]) <= set(schema["properties"])
        assert all(one["type"] == "string" and one["description"] for one in schema["properties"].values())


def test_what_a_model_calls_works(shared: Room) -> None:
    tools = {tool["name"]: tool for tool in shared.client.get(f"{shared.path}/tools").json()["tools"]}
    calls = {
        "write_file": {"path": "/home/user/by-tool.txt", "content": "hello"},
        "execute": {"command": "cat by-tool.txt"},
        "read_file": {"path": "/home/user/by-tool.txt"},
    }
    for name, arguments in calls.items():
        jsonschema_rs.validator_for(tools[name]["parameters"]).validate(arguments)
    assert shared.put(calls["write_file"]["path"], calls["write_file"]["content"].encode()).status_code == 201
    assert shared.output(calls["execute"]["command"]) == "hello"
    assert shared.file(calls["read_file"]["path"]).json()["content"] == "hello"


def test_the_description_names_what_the_image_has(api: Api) -> None:
    room = api.room(api.profile("python-data-science"))
    room.create()
    execute = room.client.get(f"{room.path}/tools").json()["tools"][0]
    for name in ("pandas", "matplotlib"):
        assert name in execute["description"].lower()
    room.delete()
