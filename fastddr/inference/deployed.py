"""What is exported: a model with its own normalisation and windows, from uint8 pixels of a canvas to probabilities."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fastddr import sampling
from fastddr.config import Config


class Deployed(nn.Module):
    """From canvases to probabilities: windows as evaluation cuts them, the normalisation, the model, and the mean.

    A canvas is the photograph, upright, scaled with antialiasing so that its short side is `canvas` pixels long.
    """

    span: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, config: Config) -> None:
        """`model`: normalised images to logits. Its windows and its normalisation are those of `config`."""
        super().__init__()
        self.model, self.size, self.config = model, config.image_size, config
        field = config.evaluation.field
        self.canvas = config.image_size if field == "full" else config.canvas
        places = sampling.NINE.tolist() if field == "multi" else [[1, 1]]
        self.places: list[tuple[int, int]] = [(int(x), int(y)) for x, y in places]
        mean, std = torch.tensor(config.augment.mean), torch.tensor(config.augment.std)
        self.register_buffer("span", torch.arange(self.size), persistent=False)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, canvas: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b C"]:
        """RGB in 0-255 to probabilities of the grades; all canvases of one batch have the same size."""
        free_y, free_x = canvas.shape[1] - self.size, canvas.shape[2] - self.size
        # By index and not by slice: so a window's size is a number in an exported graph, whatever the canvas's.
        windows = [
            canvas.index_select(1, self.span + y * free_y // 2).index_select(2, self.span + x * free_x // 2)
            for x, y in self.places
        ]
        image = (torch.cat(windows).to(torch.float32) * self.scale + self.shift).permute(0, 3, 1, 2)
        probabilities = self.model(image.contiguous()).float().softmax(1)
        return probabilities.unflatten(0, (len(windows), -1)).mean(0)
