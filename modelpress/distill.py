"""Distillation: a smaller student learns from a teacher's answers rather than from labels alone.

Classifiers learn softened class probabilities (Hinton et al. 2015, arXiv:1503.02531); embedding models learn the
teacher's embeddings; students that keep some of the teacher's layers may also match its hidden states (Sun et al.
2019, arXiv:1908.09355).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modelpress.config import DistillConfig
from modelpress.errors import StageError, WorkloadError
from modelpress.progress import Progress, silent
from modelpress.reports import DistillReport
from modelpress.train import LossFn, train_
from modelpress.workload import Batch, Outputs, Workload


def distill(
    teacher: nn.Module, workload: Workload, config: DistillConfig, progress: Progress = silent
) -> tuple[nn.Module, DistillReport]:
    """Make the student that `config` names and train it on the teacher's answers. The teacher stays as it is.

    Raises:
        WorkloadError: the teacher has no such layers, or the workload no such architecture.
        StageError: the student is not smaller than the teacher, its outputs have another shape, or training fails (see
            `train_`).
    """
    student = make_student(teacher, workload, config)
    teacher_parameters, student_parameters = count_parameters(teacher), count_parameters(student)
    if student_parameters >= teacher_parameters:
        raise StageError(
            "distilling",
            found=f"a student of {student_parameters:,} parameters and a teacher of {teacher_parameters:,}",
            expected="a smaller student",
            fix="lower the widths in distill.architecture, or keep fewer layers",
        )
    with frozen(teacher), contextlib.ExitStack() as stack:
        hidden = None
        if config.hidden_weight:
            layers = layer_list(teacher)
            taught = stack.enter_context(recorded([layers[index] for index in config.keep_layers]))
            learned = stack.enter_context(recorded(list(layer_list(student))))
            hidden = (taught, learned)
        loss_fn = distillation_loss(teacher, workload, config, hidden)
        training = train_(student, loss_fn, workload, config.train, progress)
    report = DistillReport(
        teacher_parameters=teacher_parameters,
        student_parameters=student_parameters,
        architecture=config.architecture,
        keep_layers=config.keep_layers,
        train=training,
    )
    return student, report


def distillation_loss(
    teacher: nn.Module,
    workload: Workload,
    config: DistillConfig,
    hidden: tuple[list[Tensor], list[Tensor]] | None = None,
) -> LossFn:
    """α · (loss against the teacher's outputs) + (1 − α) · (the workload's own loss) + hidden-state matching.

    A student in training mode always takes the workload's own loss. One in eval mode (early stop, on calibration
    batches) takes it where the batch has targets, and is measured by the other terms alone where it has none: unseeded
    batches need not have any.

    Args:
        teacher: frozen, in eval mode.
        workload: says what outputs are, and has the loss of the task.
        config: temperature, alpha and hidden_weight.
        hidden: the lists that `recorded` fills with the teacher's and the student's hidden states.
    """

    def loss_fn(student: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = teacher(**batch.inputs)
        output = student(**batch.inputs)
        loss: Tensor = output.new_zeros(())
        if config.alpha > 0:
            loss = loss + config.alpha * imitation_loss(output, target, workload.outputs, config.temperature)
        if config.alpha < 1 and (student.training or batch.targets is not None):
            loss = loss + (1 - config.alpha) * workload.loss(output, batch)
        if hidden is not None:
            loss = loss + config.hidden_weight * hidden_loss(*hidden, batch.inputs.get("attention_mask"))
        return loss

    return loss_fn


def imitation_loss(output: Tensor, target: Tensor, outputs: Outputs, temperature: float = 1.0) -> Tensor:
    """How far a student's outputs are from its teacher's, averaged over the batch.

    Logits, (batch, classes): T² · KL(softmax(target/T) ‖ softmax(output/T)); T² keeps the gradient's size when T
    changes. Embeddings, (batch, dim): 1 − cosine.

    Raises:
        StageError: the two differ in shape.
    """
    if output.shape != target.shape:
        raise StageError(
            "comparing the student's outputs with the teacher's",
            found=f"shape {list(output.shape)}, the teacher's {list(target.shape)}",
            expected=f"equal shapes: {outputs} of the same width",
            fix="leave the width of the output (such as hidden_size) out of distill.architecture, or learn without the "
            "teacher: distill.alpha 0",
        )
    if outputs == "embeddings":
        return (1 - nn.functional.cosine_similarity(output, target, dim=-1)).mean()
    student = nn.functional.log_softmax(output / temperature, dim=-1)
    taught = nn.functional.log_softmax(target / temperature, dim=-1)
    return temperature**2 * nn.functional.kl_div(student, taught, reduction="batchmean", log_target=True)


def hidden_loss(
    taught: list[Tensor], learned: list[Tensor], mask: Tensor | None = None, *, relative: bool = False
) -> Tensor:
    """Mean squared difference of matched hidden states, (batch, …, dim).

    Args:
        taught: the teacher's.
        learned: the student's.
        mask: (batch, length), omits padding.
        relative: divide each state's by the teacher's mean square, so that states of any size count alike.
    """
    total = learned[0].new_zeros(())
    for target, state in zip(taught, learned, strict=True):
        difference = _mean_square(state - target, mask)
        scale = _mean_square(target, mask) if relative else torch.ones_like(difference)
        total = total + difference / torch.where(scale > 0, scale, 1.0)  # zeros have no size to compare with
    return total / len(learned)


def _mean_square(state: Tensor, mask: Tensor | None) -> Tensor:
    squares = state.square()
    if mask is None:
        return squares.mean()
    weight = mask.unsqueeze(-1).to(squares.dtype)
    return (squares * weight).sum() / (weight.sum() * squares.shape[-1])


def make_student(teacher: nn.Module, workload: Workload, config: DistillConfig) -> nn.Module:
    """The untrained student: the workload's own smaller model, or a copy of the teacher with chosen layers.

    Raises:
        WorkloadError: an unknown architecture key, a layer that the teacher has not, or no list of layers at all.
    """
    if config.student == "architecture":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            return workload.skeleton(config.architecture)
    student = copy.deepcopy(teacher)
    layers = layer_list(student)
    missing = [index for index in config.keep_layers if index >= len(layers)]
    if missing:
        raise WorkloadError(
            "dropping layers",
            found=f"distill.keep_layers names {missing}",
            expected=f"numbers from 0 to {len(layers) - 1}: the teacher has {len(layers)} layers",
        )
    dropped = [index for index in range(len(layers)) if index not in config.keep_layers]
    for index in reversed(dropped):
        del layers[index]
    return student


def layer_list(module: nn.Module) -> nn.ModuleList:
    """The `ModuleList` that holds most of a module's parameters: an encoder's or decoder's layers.

    Raises:
        WorkloadError: there is none.
    """
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList) and len(child)]
    if not lists:
        raise WorkloadError(
            f"looking for the layers of {type(module).__name__}",
            found="no torch.nn.ModuleList",
            expected="layers in a ModuleList",
            fix="set distill.student to 'architecture'",
        )
    return max(lists, key=count_parameters)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """`module` in eval mode and without gradients; afterwards every part is as it was before."""
    modes = [(child, child.training) for child in module.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.eval().requires_grad_(False)
    try:
        yield module
    finally:
        for child, mode in modes:
            child.training = mode
        for parameter, gradient in gradients:
            parameter.requires_grad_(gradient)


@contextlib.contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that holds the modules' outputs (the first, where it is a tuple) of the latest forward pass, in order."""
    states: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(index: int) -> object:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states[index] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [module.register_forward_hook(keep(index)) for index, module in enumerate(modules)]  # type: ignore[arg-type]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
