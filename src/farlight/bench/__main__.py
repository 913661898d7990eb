"""`python -m farlight.bench` is `farlight bench`."""

from farlight.cli import main

if __name__ == "__main__":
    import sys

    main(["bench", *sys.argv[1:]])
