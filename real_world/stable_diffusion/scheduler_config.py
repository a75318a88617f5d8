"""scheduler_config.json, the file that stores a model's noise schedule in diffusers."""

import json
from pathlib import Path

from lesson_code import CheckpointError
from real_world.common import atomic_write, read_json
from real_world.stable_diffusion.scheduler import (
    BETA_END,
    BETA_START,
    NUM_TRAIN_TIMESTEPS,
    PREDICTION_TYPES,
    STEPS_OFFSET,
    TIMESTEP_SPACINGS,
    NoiseScheduler,
)

# For each field that changes the schedule or what the model predicts: the value if it is absent,
# which is the default of DDIMScheduler, and the supported values, which are those of schedules/.
FIELDS: dict[str, tuple[object, tuple]] = {
    "_class_name": (  # they sample in other ways, but from the same models
        "DDIMScheduler",
        (
            "DDIMScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "PNDMScheduler",
        ),
    ),
    "beta_end": (0.02, (BETA_END,)),
    "beta_schedule": ("linear", ("scaled_linear",)),
    "beta_start": (0.0001, (BETA_START,)),
    "clip_sample": (True, (False,)),
    "num_train_timesteps": (1000, (NUM_TRAIN_TIMESTEPS,)),
    "prediction_type": ("epsilon", PREDICTION_TYPES),
    "rescale_betas_zero_snr": (False, (False,)),
    "set_alpha_to_one": (True, (False,)),
    "steps_offset": (0, (STEPS_OFFSET,)),
    "thresholding": (False, (False,)),
    "timestep_spacing": ("leading", TIMESTEP_SPACINGS),
    "timestep_type": ("discrete", ("discrete",)),  # "continuous": Stable Video Diffusion
    "trained_betas": (None, (None,)),
}


def save_scheduler(path: Path, scheduler: NoiseScheduler) -> None:
    """Save a schedule; if that is interrupted, keep the old file."""
    config = {field: supported[0] for field, (_, supported) in FIELDS.items()}
    config["prediction_type"] = scheduler.prediction_type
    config["timestep_spacing"] = scheduler.timestep_spacing
    atomic_write(path, f"{json.dumps(config, indent=2)}\n".encode())


def load_scheduler(path: Path) -> NoiseScheduler:
    """Return the schedule that a scheduler_config.json describes, with DDIM as the sampler.

    It is equal to DDIMScheduler.from_config() of diffusers: absent fields have DDIMScheduler's
    defaults, and options of other samplers are ignored. Raises OSError; and CheckpointError if the
    file is not JSON, or if a value is not supported: it names each field with its value.
    """
    config = read_json(path)
    values = {field: config.get(field, default) for field, (default, _) in FIELDS.items()}
    unsupported = [
        f"{field} is {json.dumps(values[field])}"
        for field, (_, supported) in FIELDS.items()
        if values[field] not in supported
    ]
    if unsupported:
        raise CheckpointError(f"{path} is not supported: {', '.join(unsupported)}")
    return NoiseScheduler(values["prediction_type"], values["timestep_spacing"])
