"""What the networks of improved- and guided-diffusion compute, kept so that the tests need no checkout of either.

    git clone https://github.com/openai/improved-diffusion      # 1bc7bbb, the last one
    git clone https://github.com/openai/guided-diffusion        # 22e0df8, the last one
    python -m tests.golden.openai_networks improved-diffusion guided-diffusion

writes openai_networks.npz beside this file. Of each case it holds the names and shapes of the weights, which
`tests.importing.named_weights` makes of these anywhere, what the network says through their wrapper, which rescales
the timesteps, and images of their samplers on the addressed noise.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_deploy.train.noise import AddressedRandn
from tests.importing import named_weights

FILE: Final = Path(__file__).with_suffix(".npz")
CLASSES: Final = 5
LABELS: Final = [3, 0, 4]  # of the three images that a prediction is asked of
SEED: Final = 11  # of the chains' noise


@dataclass(frozen=True)
class Case:
    """One network and its process. guided: whose code. channels: of the images. flags: by their own names."""

    guided: bool
    channels: int
    flags: dict[str, Any]

    @property
    def steps(self) -> int:
        """T."""
        return int(self.flags.get("diffusion_steps", 1000))


CASES: Final = {
    "improved": Case(
        False,
        3,
        {
            "image_size": 8,
            "num_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": "1,2,2,2",
            "attention_resolutions": "4,2",
            "num_heads": 4,
            "use_scale_shift_norm": True,
            "timestep_respacing": "7",
            "rescale_timesteps": True,
        },
    ),
    "improved, 4000 cosine": Case(
        False,
        3,
        {
            "image_size": 8,
            "num_channels": 32,
            "num_res_blocks": 2,
            "channel_mult": "1,2",
            "attention_resolutions": "4",
            "num_heads": 2,
            "learn_sigma": True,
            "use_scale_shift_norm": True,
            "diffusion_steps": 4000,
            "noise_schedule": "cosine",
            "rescale_timesteps": True,
            "timestep_respacing": "25",
        },
    ),
    "improved, 4000 classes": Case(
        False,
        1,
        {
            "image_size": 8,
            "num_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": "1,2",
            "attention_resolutions": "8,4",
            "num_heads": 1,
            "class_cond": True,
            "learn_sigma": True,
            "use_scale_shift_norm": False,
            "diffusion_steps": 4000,
            "noise_schedule": "linear",
            "rescale_timesteps": False,
            "timestep_respacing": "10",
            "clip_denoised": False,
        },
    ),
    "guided": Case(
        True,
        3,
        {
            "image_size": 8,
            "num_channels": 32,
            "num_res_blocks": 2,
            "channel_mult": "1,3",
            "attention_resolutions": "4",
            "num_head_channels": 16,
            "class_cond": True,
            "learn_sigma": True,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
            "use_new_attention_order": True,
            "noise_schedule": "cosine",
            "timestep_respacing": "ddim10",
            "use_ddim": True,
        },
    ),
    "guided, old order": Case(
        True,
        1,
        {
            "image_size": 8,
            "num_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": "1,2,2",
            "attention_resolutions": "8,2",
            "num_heads": 4,
            "use_scale_shift_norm": False,
            "resblock_updown": True,
            "use_new_attention_order": False,
            "rescale_timesteps": True,
            "diffusion_steps": 50,
        },
    ),
    "guided, half": Case(
        True,
        3,
        {
            "image_size": 8,
            "num_channels": 64,
            "num_res_blocks": 2,
            "channel_mult": "0.5,1,1",
            "attention_resolutions": "4,2",
            "num_head_channels": 32,
            "learn_sigma": True,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
            "timestep_respacing": "8",
            "use_ddim": True,
        },
    ),
    "guided, x0 on one level": Case(
        True,
        1,
        {
            "image_size": 8,
            "num_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": "2",
            "attention_resolutions": "4",
            "num_heads": 2,
            "use_scale_shift_norm": False,
            "use_new_attention_order": True,
            "predict_xstart": True,
            "sigma_small": True,
            "diffusion_steps": 400,
            "rescale_timesteps": False,
            "timestep_respacing": "20",
        },
    ),
}


def asked(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """x (3, C, 8, 8), at about the size of x_t, and t (3,)."""
    size = case.flags["image_size"]
    x = np.random.default_rng(5).standard_normal((3, case.channels, size, size)).astype(np.float32)
    return torch.from_numpy(x), torch.tensor([1, case.steps // 3, case.steps - 1])


class _Peer:
    """One of the two code bases, imported from a checkout."""

    def __init__(self, checkout: str, package: str) -> None:
        sys.path.insert(0, checkout)
        module = __import__(package, fromlist=["script_util", "unet"])
        __import__(f"{package}.script_util")
        self.unet, self.util = module.unet, module.script_util

    def model(self, case: Case) -> Any:
        """The network, with the weights of its names and shapes."""
        flags, own = case.flags, ("num_head_channels", "resblock_updown", "use_new_attention_order")
        size = {"image_size": flags["image_size"]} if case.guided else {}
        resolutions = flags["attention_resolutions"].split(",")
        model = self.unet.UNetModel(
            in_channels=case.channels,
            model_channels=flags["num_channels"],
            out_channels=case.channels * (2 if flags.get("learn_sigma") else 1),
            num_res_blocks=flags["num_res_blocks"],
            attention_resolutions=[flags["image_size"] // int(part) for part in resolutions],
            channel_mult=[
                float(part) if "." in part else int(part) for part in flags["channel_mult"].split(",")
            ],
            num_classes=CLASSES if flags.get("class_cond") else None,
            num_heads=flags.get("num_heads", 4),
            use_scale_shift_norm=flags["use_scale_shift_norm"],
            **{name: flags[name] for name in own if name in flags},
            **size,
        ).eval()
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        model.load_state_dict(named_weights(shapes))
        return model

    def diffusion(self, case: Case, respacing: str) -> Any:
        """Its process."""
        names = ("learn_sigma", "sigma_small", "noise_schedule", "predict_xstart", "rescale_timesteps")
        flags = {name: case.flags[name] for name in names if name in case.flags}
        return self.util.create_gaussian_diffusion(steps=case.steps, timestep_respacing=respacing, **flags)

    @torch.no_grad()
    def prediction(self, model: Any, case: Case) -> NDArray[np.float32]:
        """What it says of `asked`."""
        x, t = asked(case)
        labels = {"y": torch.tensor(LABELS)} if case.flags.get("class_cond") else {}
        wrapped = self.diffusion(case, "")._wrap_model(model)
        result: NDArray[np.float32] = wrapped(x, t, **labels).numpy()
        return result

    def chain(self, model: Any, case: Case) -> NDArray[np.float32]:
        """One image of its own sampler on the addressed noise."""
        diffusion = self.diffusion(case, case.flags.get("timestep_respacing", ""))
        size = case.flags["image_size"]
        ddim = case.flags.get("use_ddim", False)
        loop = diffusion.ddim_sample_loop if ddim else diffusion.p_sample_loop
        with AddressedRandn(diffusion.timestep_map[::-1], seed=SEED):
            result: NDArray[np.float32] = loop(
                model,
                (1, case.channels, size, size),
                clip_denoised=case.flags.get("clip_denoised", True),
                model_kwargs={"y": torch.tensor(LABELS[:1])} if case.flags.get("class_cond") else {},
            ).numpy()
        return result


def main(improved: str, guided: str) -> None:
    """Write the file."""
    peers = {False: _Peer(improved, "improved_diffusion"), True: _Peer(guided, "guided_diffusion")}
    content: dict[str, Any] = {}
    for name, case in CASES.items():
        peer = peers[case.guided]
        model = peer.model(case)
        shapes = json.dumps({key: list(tensor.shape) for key, tensor in model.state_dict().items()})
        content[f"{name} shapes"] = np.frombuffer(shapes.encode(), np.uint8)
        content[f"{name} prediction"] = peer.prediction(model, case)
        content[f"{name} chain"] = peer.chain(model, case)
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main(*sys.argv[1:])
