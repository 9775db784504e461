import dataclasses
import json
import types
from typing import Literal, Union, get_args, get_origin, get_type_hints
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.core import checkpoint_verbs, host_verbs, log_verbs, tree_verbs, volume_verbs
from innkeeper.core.host_verbs import VERBS, EnsureMachine, Execute, path_from_wire, path_to_wire, to_wire
from innkeeper.errors import InvalidRequestError
from innkeeper.host.verbs import parser

ALL = (*VERBS, *tree_verbs.VERBS, *checkpoint_verbs.VERBS, *log_verbs.VERBS, *volume_verbs.VERBS)


@given(st.binary(max_size=60) | st.binary(max_size=20).map(lambda rest: b"b64:" + rest))
def test_any_bytes_survive(path):
    text = path_to_wire(path)
    assert path_from_wire(text) == path
    text.encode()


def test_what_is_text_stays_readable():
    assert path_to_wire("/tmp/é".encode()) == "/tmp/é"
    assert path_to_wire(b"/\xff") == "b64:L/8="
    assert path_to_wire(b"b64:QUJD") == "b64:YjY0OlFVSkQ="


@pytest.mark.parametrize("text", ["b64:!", "b64:QQ", "b64:é", "/\ud800"])
def test_bad_text(text):
    with pytest.raises(ValueError):
        path_from_wire(text)


# Fields of which not every value of their type is allowed.
CHOSEN = {
    "user": st.just("user"),
    "hostname": st.just("room-1"),
    "egress_mode": st.sampled_from(["internet", "none", "limited"]),
    "egress_cidrs": st.sampled_from([(), ("192.0.2.0/24",)]),
    "memory_mb": st.integers(128, 4_096),
    "disk_mb": st.integers(64, 4_096),
    "size_mb": st.integers(64, 4_096),
    "wait_seconds": st.floats(0, 30),
    "path": st.sampled_from(["/a", "/srv/data"]),
    # Of one that begins with a checkpoint.
    "machine": st.deferred(
        lambda: instances(EnsureMachine).map(lambda made: dataclasses.replace(made, bare=False, step_key=None))
    ),
}


def strategy(kind):
    """Values of a field's type that fit the bus."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return st.one_of([strategy(one) for one in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(strategy(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
    if dataclasses.is_dataclass(kind):
        return instances(kind)
    plain = {
        str: st.just("a" * 64),
        int: st.integers(1, 64),
        float: st.floats(1, 60),
        bool: st.booleans(),
        UUID: st.uuids(),
    }
    return plain[kind] if kind is not type(None) else st.none()


def instances(kind):
    hints = get_type_hints(kind)
    return st.builds(
        kind, **{field.name: CHOSEN.get(field.name, strategy(hints[field.name])) for field in dataclasses.fields(kind)}
    )


@given(st.sampled_from(ALL).flatmap(instances))
def test_every_request_survives_the_bus(request):
    body = json.loads(json.dumps(to_wire(request)))
    call = types.SimpleNamespace(params={"verb": request.verb, **body})
    assert parser(type(request))(call) == request


def test_verbs_are_named_once():
    names = [verb.verb for verb in ALL]
    assert len(set(names)) == len(names)
    defined = {one for one in vars(host_verbs).values() if dataclasses.is_dataclass(one) and hasattr(one, "verb")}
    assert defined == set(VERBS)


@pytest.mark.parametrize("params", [{"instance_id": "x"}, {}, {"instance_id": str(UUID(int=1)), "more": 1}])
def test_a_bad_request_is_refused_without_its_values(params):
    call = types.SimpleNamespace(params={"verb": "exec", **params, "env": {"KEY": ["hunter2"]}})
    with pytest.raises(InvalidRequestError) as caught:
        parser(Execute)(call)
    assert "hunter2" not in str(caught.value)


def test_env_is_not_shown():
    shape = host_verbs.MachineShape("k", "d", "gvisor", 1, 1, 1, "none")
    for request in (
        EnsureMachine(UUID(int=1), shape, "h", env={"KEY": "hunter2"}),
        Execute(UUID(int=1), UUID(int=2), "true", 1.0, env={"KEY": "hunter2"}),
        host_verbs.WarmPool(shape, 1, env={"KEY": "hunter2"}),
    ):
        assert "hunter2" not in repr(request)
