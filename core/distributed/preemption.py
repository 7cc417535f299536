"""A scheduler's request to stop: after SIGTERM or SIGUSR1 the run saves and exits with code 75.

Slurm's preemption and time limit, torchrun's shutdown and a plain `kill` send one of the two.
"""

import logging
import signal
import sys
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from core.distributed.world import World

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h, "try again later"; slurm.sbatch requeues on it

logger = logging.getLogger(__name__)


class Preemption:
    """Listens for the signals until close(); all ranks learn of a request at the same step."""

    def __init__(self, world: World) -> None:
        self.world, self._noted = world, False
        self._flag, self._sent = torch.zeros(1, dtype=torch.int32), None
        self._handlers = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)
        }

    def requested(self) -> bool:
        """Whether any rank was asked to stop; call it once per step on all ranks.

        The ranks exchange their answers on the CPU while a step computes and read them one step
        later, so this waits neither for the device nor for the network.
        """
        if self.world.size == 1:
            return self._noted
        if self._sent is not None:
            self._sent.wait()
        agreed = bool(self._flag[0])
        self._flag = torch.tensor([int(self._noted)], dtype=torch.int32)
        self._sent = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)
        return agreed

    def leave(self, step: int) -> NoReturn:
        """Exit the process; the scheduler is expected to run the same command again."""
        if self.world.is_main:
            logger.warning(
                "asked to stop: saved after step %d; leaving with code %d, run the same command "
                "again to continue",
                step,
                REQUEUE,
            )
        sys.exit(REQUEUE)

    def close(self) -> None:
        """Restore the signal handlers of before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
