"""Training: DeepSpeed's engine around the model, the loop, evaluation and what a run writes down."""
