"""DeepSpeed's JSON: the user's keys, and dsmoe's own over them."""

from __future__ import annotations

from dsmoe.config import validate_config
from dsmoe.routers.registry import option_classes
from dsmoe.training.engine import deepspeed_json


def test_deepspeed_gets_the_users_keys_and_dsmoes_own_over_them():
    tree = {
        "training": {"global_batch_size": 24, "gradient_accumulation": 3, "clip_grad": 0.5, "precision": "bf16"},
        "parallel": {"zero_stage": 2},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": True}, "steps_per_print": 5},
    }
    settings = deepspeed_json(validate_config(tree, option_classes()), world_size=4)
    assert settings["train_batch_size"] == 24
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"] == {"enabled": True} and settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["steps_per_print"] == 5
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["overlap_comm"]) == (2, 7, True)
    assert zero["reduce_scatter"] is True and zero["contiguous_gradients"] is True
