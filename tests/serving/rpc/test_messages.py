"""The messages are the protocol's: as compiled, and as clients that others wrote spell them."""

from __future__ import annotations

from typing import Any

import pytest

from serving.rpc import descriptor
from serving.rpc.messages import MESSAGES, METHODS, SERVICE
from serving.rpc.service import NEEDS


def test_the_descriptor_is_that_of_the_file() -> None:
    assert descriptor.DESCRIPTOR.read_bytes() == descriptor.compiled(), "python -m serving.rpc.descriptor"


def test_every_method_says_what_it_takes_to_be_called() -> None:
    assert set(NEEDS) == set(METHODS)


def fields(message: Any) -> dict[str, Any]:
    """Numbers, names and kinds of a message and of those inside of it."""
    found: dict[str, Any] = {}
    for field in message.fields:
        inner = field.message_type
        parameter = inner is not None and inner.name in ("InferParameter", "ModelRepositoryParameter")
        within = inner.name if parameter else fields(inner) if inner else None
        found[field.name] = (field.number, field.type, within)
    return found


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_messages_are_those_of_triton_s_client(name: str) -> None:
    """Field by field, by number and type: so bytes of one are read by the other."""
    service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
    ours, theirs = fields(MESSAGES[name].DESCRIPTOR), fields(getattr(service_pb2, name).DESCRIPTOR)
    assert {field: theirs.get(field) for field in ours} == ours
    assert getattr(service_pb2, name).DESCRIPTOR.full_name == MESSAGES[name].DESCRIPTOR.full_name


def test_methods_are_those_of_triton_s_client() -> None:
    service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
    theirs = service_pb2.DESCRIPTOR.services_by_name[SERVICE.rpartition(".")[2]].methods_by_name
    for name, (asked, answered) in METHODS.items():
        assert theirs[name].input_type.full_name == asked.DESCRIPTOR.full_name
        assert theirs[name].output_type.full_name == answered.DESCRIPTOR.full_name
