"""`python -m fused_losses.build`: builds csrc into a cache; kernels/build.py has it all."""

from .kernels.build import main

if __name__ == "__main__":
    main()
