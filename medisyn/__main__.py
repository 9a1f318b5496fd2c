"""`python -m medisyn ...` is the `medisyn` command."""

from .cli import main

if __name__ == "__main__":
    main()
