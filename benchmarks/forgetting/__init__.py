"""Which loss at which learning rate: what fine-tuning teaches SmolLM2-135M-Instruct, and what is forgotten meanwhile.

    python -m benchmarks.forgetting [--quick] [--jobs 2] [--output FOLDER]

grid.py has the runs, methods.py the losses, run.py one run; docs/forgetting.md what was found.
"""
