"""A data-parallel model for fairseq2's trainer, whose gradients are divided by the count of all ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from fairseq2.nn.data_parallel import DataParallelFacade
from torch import Tensor


class CountedFacade(DataParallelFacade):  # type: ignore[misc]
    """What fairseq2 asks of a data-parallel model: as its own, and the step's gradients divided by what all
    ranks count."""

    def __init__(self, inner: DataParallelFacade, step_done: Callable[[], Tensor]):
        self._inner, self._step_done = inner, step_done

    def state_dict(self) -> dict[str, object]:
        return dict(self._inner.state_dict())

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._inner.load_state_dict(state_dict)

    def no_sync(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self._inner.no_sync()
        return context

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        return self._step_done()

    def summon_full_parameters(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self._inner.summon_full_parameters()
        return context
