"""Training: DeepSpeed's engine around the model, the loop, evaluation and what a run writes down."""

import dsmoe.optim.deepspeed  # noqa: F401  (imports DeepSpeed's engine without compiling, so it comes first)
