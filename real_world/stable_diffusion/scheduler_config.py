"""Reads scheduler_config.json, the file that stores a model's noise schedule in diffusers."""

import json
from pathlib import Path

from real_world.stable_diffusion.scheduler import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    NoiseScheduler,
)

# The schedulers that diffusers can replace by its DDIMScheduler: they sample in other ways, but
# from the same models. Others, such as those of flow matching, have no betas.
COMPATIBLE_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)

# Fields with other values would change what the model predicts, or the schedule.
SUPPORTED_VALUES: dict[str, tuple] = {
    "_class_name": COMPATIBLE_SCHEDULERS,
    "beta_schedule": BETA_SCHEDULES,
    "prediction_type": PREDICTION_TYPES,
    "thresholding": (False, None),
    "timestep_spacing": TIMESTEP_SPACINGS,
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_flow_sigmas": (False, None),
    "variance_type": (
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        None,
    ),  # not learned: then, the model's output has twice as many channels
}


def load_scheduler(path: Path | str) -> NoiseScheduler:
    """Return the scheduler that a scheduler_config.json describes, with DDIM as the sampler.

    It is equal to DDIMScheduler.from_config() of diffusers: fields that are missing have the
    defaults of DDIMScheduler, and options of other samplers are ignored. Raises ValueError if the
    file is not JSON, or has fields that are not supported; it names all of them.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    if "_class_name" in config:  # old files have the names that the classes had for Flax
        config["_class_name"] = str(config["_class_name"]).removeprefix("Flax")
    unsupported = [
        f"{field} {json.dumps(config[field])}"
        for field, values in SUPPORTED_VALUES.items()
        if field in config and config[field] not in values
    ]
    if unsupported:
        raise ValueError(f"{path} has unsupported values: {', '.join(unsupported)}")
    try:
        return NoiseScheduler(
            beta_schedule=config.get("beta_schedule", "linear"),
            beta_start=config.get("beta_start", 0.0001),
            beta_end=config.get("beta_end", 0.02),
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            prediction_type=config.get("prediction_type", "epsilon"),
            clip_sample=config.get("clip_sample", True),
            clip_sample_range=config.get("clip_sample_range", 1.0),
            set_alpha_to_one=config.get("set_alpha_to_one", True),
            steps_offset=config.get("steps_offset", 0),
            timestep_spacing=config.get("timestep_spacing", "leading"),
            rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
