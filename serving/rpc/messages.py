"""The messages of the protocol, as classes of protobuf in a pool of their own.

Their attributes are known to protobuf and not to Python's checker: `open_inference.proto` is what says them.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

SERVICE = "inference.GRPCInferenceService"


def _load() -> tuple[dict[str, Any], Any]:
    data = resources.files(__package__).joinpath("open_inference.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.AddSerializedFile(file.SerializeToString())
    service = pool.FindServiceByName(SERVICE)
    every = {message.name: message for method in service.methods for message in (method.input_type, method.output_type)}
    return {name: message_factory.GetMessageClass(message) for name, message in every.items()}, service


MESSAGES, _SERVICE = _load()
"""Classes of requests and answers by name."""
METHODS: dict[str, tuple[Any, Any]] = {
    method.name: (MESSAGES[method.input_type.name], MESSAGES[method.output_type.name]) for method in _SERVICE.methods
}
"""Classes of the request and of the answer, by name of the method."""
