"""Studies: many training runs under one plan, and what they show together."""
