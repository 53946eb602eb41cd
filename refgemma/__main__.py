"""``python -m refgemma``: the command line of `refgemma.cli.main`."""

import sys

from refgemma.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
