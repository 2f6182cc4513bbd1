"""`python -m dist_agc.cli`: what torchrun starts on every rank, and the command where its script is not on the path."""

from . import main

if __name__ == "__main__":
    main()
