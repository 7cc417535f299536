"""torchrun that does not try a mistake again: the last step of launch.sh.

A process that ends with exit code 2 sends SIGUSR2 to torchrun (core.config.fail). torchrun passes
the signal on to the other processes of its node, which it ends, and leaves here with code 2.
"""

import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException

if __name__ == "__main__":
    try:
        run.main(sys.argv[1:])
    except SignalException as error:
        if error.sigval != signal.SIGUSR2:
            raise
        sys.exit(2)
