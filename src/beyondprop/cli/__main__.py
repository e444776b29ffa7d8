"""`python -m beyondprop.cli`."""

import sys

from beyondprop.cli import main

if __name__ == "__main__":
    sys.exit(main())
