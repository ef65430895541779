"""What a process runs that tries variants: one flow run after the other, until its parent is gone.

`python -m flows.variant_process CORES` is started by `flows.variants`, and by nobody else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from modelpress.workers.process import serve

if TYPE_CHECKING:
    from modelpress.reduce import Part


def _variants() -> Callable[[bytes], Part]:
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow

    from flows.variants import VariantJob, optimize_variant
    from modelpress.reduce import Part, Variants
    from modelpress.reports import TriedVariant

    def do(line: bytes) -> Part:
        job = VariantJob.model_validate_json(line)
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(UUID(job.flow_run))
        made = run_flow(optimize_variant, flow_run=run)
        tried = {made.number: made} if isinstance(made, TriedVariant) else {}
        return Part(of=job.of, slice=job.slice, attempt=job.attempt, value=Variants(tried=tried))

    return do


if __name__ == "__main__":
    serve(sys.argv[1], _variants)
