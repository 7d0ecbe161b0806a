"""`python -m fused_losses` is the command `fused-losses`."""

from .cli import main

if __name__ == "__main__":
    main()
