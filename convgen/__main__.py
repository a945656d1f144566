"""``convgen`` and ``python -m convgen``: the command line.

Until it is imported, which takes a tenth of a second, Ctrl-C simply ends the process.
"""

import signal
import sys


def main(prog_name: str = "convgen") -> int:
    """Runs the command line and returns its exit status."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from convgen import cli

    try:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)
        return cli.main(prog_name=prog_name)
    except KeyboardInterrupt:
        return cli.INTERRUPTED
    finally:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main("python -m convgen"))
