"""`python -m beyondprop.cli`."""

import sys

from beyondprop.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
