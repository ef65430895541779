"""Configurations of a Triton model repository, read by what Triton itself says of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message
from onnx import ModelProto, TensorProto, helper, numpy_helper

from modelpress.errors import ConfigError
from modelpress.load.layouts import triton


def model_of(inputs: list[Any], outputs: list[Any]) -> ModelProto:
    """A graph with these signatures (name, type, axes), which is not run."""
    made = [[helper.make_tensor_value_info(*one) for one in side] for side in (inputs, outputs)]
    weight = numpy_helper.from_array(np.zeros(3, np.float32), "weight")
    value = helper.make_tensor_value_info("weight", TensorProto.FLOAT, [3])
    return helper.make_model(helper.make_graph([], "g", [*made[0], value], made[1], [weight]))


def test_a_configuration_says_what_the_graph_takes() -> None:
    model = model_of(
        [("ids", TensorProto.INT64, ["n", "length"]), ("flag", TensorProto.BOOL, ["n"])],
        [("logits", TensorProto.BFLOAT16, ["n", "length", 304]), ('odd "é\n', TensorProto.STRING, ["n", None])],
    )
    config = parse(triton.config("a-model", model))
    assert config["max_batch_size"] == triton.MAX_BATCH_SIZE
    assert config["input"] == [
        {"name": "ids", "data_type": "TYPE_INT64", "dims": [-1]},
        {"name": "flag", "data_type": "TYPE_BOOL", "dims": [1], "reshape": {"shape": []}},
    ]
    assert config["output"] == [
        {"name": "logits", "data_type": "TYPE_BF16", "dims": [-1, 304]},
        {"name": 'odd "é\n', "data_type": "TYPE_STRING", "dims": [-1]},
    ]


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ([["n", 4]], [3, 4]),
        ([["n", 4]], ["m", 4]),
        ([["n", 4]], []),
        ([[2, 4]], [2, 4]),
        ([["n", 4], [4, 4]], ["n", 4]),
        ([[None, 4]], [None, 4]),
    ],
    ids=["fixed", "another name", "scalar", "all fixed", "one input without", "nameless"],
)
def test_what_cannot_be_batched_is_not(inputs: list[list[Any]], output: list[Any]) -> None:
    taken = [(f"x{number}", TensorProto.FLOAT, axes) for number, axes in enumerate(inputs)]
    config = parse(triton.config("demo", model_of(taken, [("y", TensorProto.FLOAT, output)])))
    assert config["max_batch_size"] == 0
    assert "dynamic_batching" not in config
    assert [one["dims"] for one in config["input"]] == [
        [-1 if not isinstance(a, int) else a for a in axes] for axes in inputs
    ]
    if not output:
        assert config["output"] == [{"name": "y", "data_type": "TYPE_FP32", "dims": [1], "reshape": {"shape": []}}]


def test_types_that_triton_lacks_are_refused() -> None:
    model = model_of([("x", TensorProto.FLOAT8E4M3FN, ["n"])], [])
    with pytest.raises(ConfigError, match=r"'x' of its graph[\s\S]*FLOAT8E4M3FN"):
        triton.config("demo", model)
    scalar = model_of([("x", TensorProto.FLOAT, None)], [])
    with pytest.raises(ConfigError, match="any number of axes"):
        triton.config("demo", scalar)


FIELDS: dict[str, list[tuple[str, int, str, bool]]] = {
    "ModelConfig": [
        ("name", 1, "string", False), ("platform", 2, "string", False), ("backend", 17, "string", False),
        ("max_batch_size", 4, "int32", False), ("input", 5, "ModelInput", True), ("output", 6, "ModelOutput", True),
        ("instance_group", 7, "ModelInstanceGroup", True), ("default_model_filename", 8, "string", False),
        ("dynamic_batching", 11, "ModelDynamicBatching", False),
    ],
    "ModelInput": [
        ("name", 1, "string", False), ("data_type", 2, "DataType", False), ("dims", 4, "int64", True),
        ("reshape", 5, "ModelTensorReshape", False),
    ],
    "ModelOutput": [
        ("name", 1, "string", False), ("data_type", 2, "DataType", False), ("dims", 3, "int64", True),
        ("reshape", 5, "ModelTensorReshape", False),
    ],
    "ModelTensorReshape": [("shape", 1, "int64", True)],
    "ModelInstanceGroup": [("count", 2, "int32", False), ("kind", 4, "Kind", False)],
    "ModelDynamicBatching": [("max_queue_delay_microseconds", 2, "uint64", False)],
}  # fmt: skip
"""The part of Triton's model_config.proto that is used: name, number, type, whether repeated."""
ENUMS = {
    "DataType": ["TYPE_INVALID", *triton.TYPES.values()],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
}


def described() -> type[Message]:
    """`ModelConfig` of `FIELDS`; text with any other field or value does not parse."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="part_of_model_config.proto", package="part", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for label, number, kind, repeated in fields:
            one = message.field.add(name=label, number=number)
            one.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind in FIELDS or kind in ENUMS:
                one.type = field.TYPE_ENUM if kind in ENUMS else field.TYPE_MESSAGE
                one.type_name = f".part.{kind}"
            else:
                one.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("part.ModelConfig"))


def parse(text: str) -> dict[str, Any]:
    """The configuration as fields that are set; scalars that proto3 leaves out at 0 are there."""

    def plain(message: Message) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                found[field.name] = [plain(one) for one in value] if field.is_repeated else plain(value)
            elif field.type == field.TYPE_ENUM:
                found[field.name] = field.enum_type.values_by_number[value].name
            else:
                found[field.name] = list(value) if field.is_repeated else value
        if "reshape" in found:
            found["reshape"] = {"shape": list(message.reshape.shape)}  # type: ignore[attr-defined]
        return found

    document = plain(text_format.Parse(text, described()()))
    for one in document["instance_group"]:
        one.setdefault("kind", "KIND_AUTO")
    return {"max_batch_size": 0, **document}


def test_triton_own_definition_reads_the_configuration() -> None:
    """`model_config.proto` as the client package of Triton carries it."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("install the extra 'dev' for Triton's own definition of its configuration (tritonclient)")
    path = Path(found.submodule_search_locations[0]) / "grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)  # without grpc, which its package imports
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = model_of(
        [("ids", TensorProto.INT64, ["n", "length"]), ("flag", TensorProto.BOOL, ["n"])],
        [(f"y{kind}", kind, ["n", 3]) for kind in triton.TYPES],
    )
    config = text_format.Parse(triton.config("demo", model), module.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("demo", "onnxruntime", triton.MAX_BATCH_SIZE)
    assert [module.DataType.Name(one.data_type) for one in config.output] == list(triton.TYPES.values())
    assert list(config.input[0].dims) == [-1]
    assert config.input[1].HasField("reshape")
    assert config.HasField("dynamic_batching")
    assert config.instance_group[0].kind == module.ModelInstanceGroup.KIND_AUTO
