"""``python -m dpsyngen``."""

from dpsyngen.cli import main

main()
