"""`python -m fgpt.cli VERB ...` is `fgpt VERB ...`."""

import sys

from fgpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
