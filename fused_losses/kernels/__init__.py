"""What is compiled: the operators of csrc (schemas, build), Triton's kernels (triton/), timing and choosing tiles
(measure, tune)."""
