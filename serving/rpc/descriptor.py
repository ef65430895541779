"""Compiles `open_inference.proto` to the descriptor that `messages` reads: `python -m serving.rpc.descriptor`.

Needs grpcio-tools, which the server does not. The descriptor is kept in place of generated code, because that would go
into protobuf's one pool of the process, where another client's definition of the same messages may be already.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PROTO, DESCRIPTOR = HERE / "open_inference.proto", HERE / "open_inference.binpb"


def compiled() -> bytes:
    """The descriptor of the file as it is: a serialized FileDescriptorSet.

    Raises:
        RuntimeError: the compiler refuses it; what it says is on standard error.
    """
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made")
        if protoc.main(["protoc", f"--proto_path={HERE}", f"--descriptor_set_out={made}", PROTO.name]) != 0:
            raise RuntimeError(f"protoc refuses {PROTO}")
        return made.read_bytes()


if __name__ == "__main__":
    DESCRIPTOR.write_bytes(compiled())
    sys.stdout.write(f"wrote {DESCRIPTOR}\n")
