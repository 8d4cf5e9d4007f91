"""Train a grader: `accelerate launch fastddr/train.py [--data DDR-dataset] [--preset NAME] ...`, or `fastddr train`.

This file is `__main__` under `accelerate launch`, so it defines no class and holds no logic.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, prog: str = "fastddr/train.py") -> int:
    """Parse, train, and return the exit code: 0; 1 = a rank is lost; 2 = a mistake of the user's; 3 = stopped."""
    from fastddr.collector import no_collector
    from fastddr.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR, UserError
    from fastddr.ranks import RankLost, die_with_parent
    from fastddr.terminal import any_terminal, to_nobody

    # Before what takes seconds to import: a launcher that dies meanwhile would leave this process behind.
    die_with_parent()
    any_terminal()
    to_nobody()
    try:
        from fastddr.cli import parse

        config = parse(sys.argv[1:] if arguments is None else arguments, prog)
        # Imported after parsing: --help and a wrong flag need not wait for PyTorch.
        with no_collector():
            from fastddr.trainer import Trainer

        with Trainer(config) as trainer:
            trainer.fit()
            stopped = trainer.stopped
    except UserError as error:
        # In one piece: ranks share the stream, and `print` writes the end of the line apart.
        sys.stderr.write(f"fastddr: {error}\n")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("\nfastddr: interrupted; a run that has begun goes on with the same command and --run-dir.\n")
        return _left_behind(EXIT_INTERRUPTED)
    except RankLost as error:
        sys.stderr.write(f"fastddr: {error}\n")
        return _left_behind(1)
    return 0 if stopped is None else EXIT_STOPPED


def _left_behind(code: int) -> int:
    """The exit code, where other ranks may be elsewhere in training; with GPUs the process ends here."""
    from fastddr.ranks import world

    torch = sys.modules.get("torch")
    if world() > 1 and torch is not None and torch.cuda.is_initialized():
        # To end in order would be to wait for the card, and that waits for collectives that others never enter.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
