"""The command `fastddr VERB`."""

from __future__ import annotations

import importlib
import sys

from fastddr.collector import no_collector
from fastddr.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, nearest
from fastddr.terminal import all_said, any_terminal, to_nobody, unread

USAGE = """usage: fastddr VERB [options]

  train    train, evaluate and report a grader (the same as `accelerate launch fastddr/train.py`, one process)
  check    decode every photograph of a data set, and say what is wrong with it
  prepare  crop every photograph to the retina and make it smaller, once, so that training is fast
  plan     predict the GPU memory of a training, without a GPU, and what to change so that it fits
  evaluate score a run's weights on a split, or on other data
  compare  set runs side by side on the same photographs, with intervals of their differences
  report   make the report of a run again
  predict  grade photographs without labels by a run's weights, into a table
  export   write a run's model as ONNX, torch.export or safetensors, checked, with a model card
  synth    write a synthetic DDR data set into a folder

`fastddr VERB --help` tells a verb's options; `fastddr --version` the version.
"""

VERBS = ("train", "check", "prepare", "plan", "evaluate", "compare", "report", "predict", "export", "synth")
#: Verbs that load PyTorch, each a module of `fastddr.inference`.
LATER = ("evaluate", "compare", "report", "predict", "export")
#: Verbs whose work is in files when they end, whoever listens.
INTO_FILES = ("prepare", "evaluate", "report", "predict", "export", "synth")


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; its exit code is the command's: 0; 1 = what the verb looks for is wrong, or a rank is lost; 2 = a
    mistake of the user's; 3 = a training was stopped and has saved; 130 = Ctrl-C."""
    any_terminal()
    try:
        code = _main(arguments)
    except SystemExit:  # after --help
        if not all_said():
            return 1
        raise
    except KeyboardInterrupt:
        print("\nfastddr: interrupted; the same command begins again, or goes on.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if not unread():
            raise
        return 1
    # What nobody reads is told here, and not at Python's end, where it would take the place of the exit code.
    return code if all_said() else code or 1


def _main(arguments: list[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else EXIT_USER_ERROR
    verb, rest = arguments[0], arguments[1:]
    if verb == "--version":
        from fastddr import __version__

        print(f"fastddr {__version__}")
        return 0
    if verb == "train":
        from fastddr import train

        return train.main(rest, prog="fastddr train")
    if verb not in VERBS:
        print(f"fastddr: there is no verb {verb!r}; {nearest(verb, VERBS)}", file=sys.stderr)
        return EXIT_USER_ERROR
    if verb in INTO_FILES:
        to_nobody()
    from fastddr.cli import answered

    return answered(lambda: _work(verb, rest))


def _work(verb: str, arguments: list[str]) -> int:
    if verb not in LATER:
        from fastddr import verbs

        return verbs.main(verb, arguments)
    from fastddr import cli
    from fastddr.inference import flags

    asked = cli.flags(getattr(flags, verb.capitalize()), arguments, f"fastddr {verb}")
    with no_collector():
        module = importlib.import_module(f"fastddr.inference.{verb}")
    code: int = module.main(asked)
    return code


if __name__ == "__main__":
    sys.exit(main())
