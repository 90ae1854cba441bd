"""`python -m rmtkd`, the command line."""

from rmtkd.cli import main

if __name__ == "__main__":
    main()
