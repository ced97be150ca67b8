"""What tools/plan.py computes with: hardware, models, strategies, kernels, and from these memory and time."""
