"""`python -m farlight`: the command line."""

from farlight.cli import main

if __name__ == "__main__":
    main()
