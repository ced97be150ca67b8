"""What tools/plan.py computes with: hardware, models, strategies, and their memory and time."""
