import sys

from cppo_verl.cli import main

sys.exit(main())
