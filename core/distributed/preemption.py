"""A scheduler's request to stop: SIGTERM or SIGUSR1 -> save, then leave with code 75.

Slurm's pre-emption and time limit, torchrun's shutdown and a plain `kill` all send one of the two.
"""

import logging
import signal
import sys
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from core.distributed.world import World

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h, "try again later": what the Slurm script requeues on

logger = logging.getLogger(__name__)


class Preemption:
    """Notices the signals from now on; every rank learns of them at the same step."""

    def __init__(self, world: World) -> None:
        self.world, self._noted = world, False
        self._flag, self._sent = torch.zeros(1, dtype=torch.int32), None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def requested(self) -> bool:
        """Whether any rank was asked to stop; call it once per step on all ranks.

        The ranks' answers are exchanged on the CPU while the step computes and read a step later,
        so nothing waits for the device or the network.
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
        """End the process, for a scheduler to start the same command again."""
        if self.world.is_main:
            logger.warning(
                "asked to stop: saved after step %d; leaving with code %d, run the same command "
                "again to continue",
                step,
                REQUEUE,
            )
        sys.exit(REQUEUE)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
