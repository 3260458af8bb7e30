"""`python -m batchgen.cli`."""

from batchgen.cli import main

if __name__ == "__main__":
    main()
