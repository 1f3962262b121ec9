"""``python -m dpsyngen``."""

from dpsyngen.cli.app import main

main()
