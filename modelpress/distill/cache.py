"""The teacher's likeliest answers to the training data, kept, so that it runs once and not in each epoch.

For each token the k largest log-probabilities stay (float16, with their int32 classes) and the logarithm of what all
others have together (float32): as a distribution of k + 1 classes it is compared with the student's, grouped alike.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from modelpress.config import DistillConfig
from modelpress.distill.losses import Divergence, counted, divergence_of
from modelpress.errors import StageError
from modelpress.progress import Progress
from modelpress.workload import Batch, Workload, row_digests

MAX_CACHE_BYTES = 4 * 2**30
"""In memory; more is refused before the teacher runs."""


class TeacherCache:
    """Cached soft labels of the training split, found again by the content of a sample's inputs.

    Args:
        teacher: frozen, in eval mode.
        workload: whose training inputs must be the same in each epoch.
        config: `cache_top_k`, temperature and the batch size of the training.
        progress: told of each batch.

    Raises:
        StageError: outputs that are no logits, are not finite or differ in length, more than `MAX_CACHE_BYTES`.
    """

    def __init__(self, teacher: nn.Module, workload: Workload, config: DistillConfig, progress: Progress) -> None:
        if workload.outputs != "logits":
            raise StageError("caching the teacher", found=workload.outputs, expected="logits", fix="cache_top_k 0")
        self.temperature, self.rows = config.temperature, _number_rows(workload, config.train.batch_size)
        device = next(teacher.parameters()).device
        done = 0
        for batch in workload.batches("train", config.train.batch_size):
            with torch.no_grad():
                logits = teacher(**{name: tensor.to(device) for name, tensor in batch.inputs.items()})
            if not done:
                self._allocate(logits, config.cache_top_k)
            self._keep(batch, logits)
            done += len(batch)
            progress(0, 1, f"teacher: {done} of {len(self.rows)} samples")

    @property
    def size_bytes(self) -> int:
        """Bytes that are held."""
        return self.values.nbytes + self.classes.nbytes + self.rest.nbytes

    def loss(self, output: Tensor, batch: Batch, divergence: Divergence, mask: Tensor | None = None) -> Tensor:
        """T² · KL as `imitation_loss` has it, over the k cached classes and the rest as one: never more than the whole
        KL, and equal to it where k is the number of classes.

        Raises:
            StageError: a sample that the teacher did not see.
        """
        found = [self.rows.get(digest) for digest in row_digests(batch)]
        if None in found or output.shape[1:-1] != self.shape:
            raise StageError(
                "looking up the teacher's cached answers",
                found=f"{found.count(None)} samples of {len(found)} whose inputs differ from the first pass",
                expected="the same training inputs in each epoch: no augmentation, no padding that hangs on the order",
                fix="set distill.cache_top_k to 0: the teacher then answers each batch as it comes",
            )
        if output.shape[-1] != self.width:
            raise StageError(
                "comparing the student's outputs with the teacher's cached answers",
                found=f"{output.shape[-1]} classes, the teacher's {self.width}",
                expected="as many",
                fix="leave the width of the output out of distill.architecture",
            )
        index = np.array(found)
        taught, classes, rest = (
            counted(torch.from_numpy(part[index]).to(output.device), mask)
            for part in (self.values, self.classes, self.rest)
        )
        student = counted(nn.functional.log_softmax(output / self.temperature, dim=-1), mask)
        classes = classes.long()
        own, known = student.gather(-1, classes), taught.to(student.dtype)
        if known.shape[-1] < student.shape[-1]:
            others = student.scatter(-1, classes, -torch.inf).logsumexp(dim=-1, keepdim=True)
            own, known = torch.cat([own, others], dim=-1), torch.cat([known, rest.to(student.dtype)], dim=-1)
        known = nn.functional.log_softmax(known, dim=-1)  # float16 rounds: the probabilities sum to 1 again
        masked = mask is not None and mask.shape == output.shape[:-1]
        return self.temperature**2 * divergence_of(own, known, divergence, masked=masked)

    def _allocate(self, logits: Tensor, top_k: int) -> None:
        self.shape, self.width = logits.shape[1:-1], logits.shape[-1]
        k = min(top_k, self.width)
        tokens = len(self.rows) * self.shape.numel()
        if tokens * (6 * k + 4) > MAX_CACHE_BYTES:
            raise StageError(
                "caching the teacher's answers",
                found=f"{tokens:,} tokens with {k} classes each: {tokens * (6 * k + 4):,} bytes",
                expected=f"at most {MAX_CACHE_BYTES:,}",
                fix="lower distill.cache_top_k or workload.train_samples, or set distill.cache_top_k to 0",
            )
        leading = (len(self.rows), *self.shape)
        self.values = np.empty((*leading, k), dtype=np.float16)
        self.classes = np.empty((*leading, k), dtype=np.int32)
        self.rest = np.empty((*leading, 1), dtype=np.float32)

    def _keep(self, batch: Batch, logits: Tensor) -> None:
        known = nn.functional.log_softmax(logits.float() / self.temperature, dim=-1)
        if logits.shape[1:-1] != self.shape or not torch.isfinite(known).all():
            raise StageError(
                "caching the teacher's answers",
                found=f"outputs of shape {list(logits.shape)}, {int((~torch.isfinite(known)).sum())} not finite",
                expected=f"finite logits of {[len(batch), *self.shape]} places, as in the first batch",
                fix="set distill.cache_top_k to 0",
            )
        index = np.array([self.rows[digest] for digest in row_digests(batch)])
        values, classes = known.topk(self.values.shape[-1], dim=-1)
        self.values[index] = values.cpu().numpy()
        self.classes[index] = classes.cpu().numpy()
        self.rest[index] = known.scatter(-1, classes, -torch.inf).logsumexp(dim=-1, keepdim=True).cpu().numpy()


def _number_rows(workload: Workload, batch_size: int) -> dict[str, int]:
    """A number for each distinct sample of the training split, by the digest of its inputs."""
    rows: dict[str, int] = {}
    for batch in workload.batches("train", batch_size):
        for digest in row_digests(batch):
            rows.setdefault(digest, len(rows))
    if not rows:
        raise StageError("caching the teacher", found="an empty training split", expected="at least one sample")
    return rows
