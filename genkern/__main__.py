import sys

from genkern.cli import main

sys.exit(main())
