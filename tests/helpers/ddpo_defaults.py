# SPDX-License-Identifier: Apache-2.0

"""DDPO's configuration as TRL had it."""

# Fields of DDPOConfig in TRL 0.23.1, the last release that had it, and their defaults (exp_name's is the script's).
DDPO_DEFAULTS = {
    "run_name": "", "seed": 0, "log_with": None, "tracker_kwargs": {}, "accelerator_kwargs": {}, "project_kwargs": {},
    "tracker_project_name": "trl", "logdir": "logs", "num_epochs": 100, "save_freq": 1, "num_checkpoint_limit": 5,
    "mixed_precision": "fp16", "allow_tf32": True, "resume_from": "", "sample_num_steps": 50, "sample_eta": 1.0,
    "sample_guidance_scale": 5.0, "sample_batch_size": 1, "sample_num_batches_per_epoch": 2, "train_batch_size": 1,
    "train_use_8bit_adam": False, "train_learning_rate": 3e-4, "train_adam_beta1": 0.9, "train_adam_beta2": 0.999,
    "train_adam_weight_decay": 1e-4, "train_adam_epsilon": 1e-8, "train_gradient_accumulation_steps": 1,
    "train_max_grad_norm": 1.0, "train_num_inner_epochs": 1, "train_cfg": True, "train_adv_clip_max": 5.0,
    "train_clip_range": 1e-4, "train_timestep_fraction": 1.0, "per_prompt_stat_tracking": False,
    "per_prompt_stat_tracking_buffer_size": 16, "per_prompt_stat_tracking_min_count": 16,
    "async_reward_computation": False, "max_workers": 2, "negative_prompts": "", "push_to_hub": False,
}  # fmt: skip
