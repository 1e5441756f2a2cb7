"""``python -m fastssl`` is the ``fastssl`` command, for launchers such as torchrun."""

import sys

from fastssl.cli import main

sys.exit(main())
