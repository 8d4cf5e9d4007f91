"""What is exported: a model from uint8 pixels of a canvas to probabilities; and its formats, each of which writes a
file, and reads it back as a function for the check."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastddr import sampling
from fastddr.config import Config
from fastddr.errors import UserError
from fastddr.evaluation import grading
from fastddr.inference.flags import Format

#: What a file is read back as: canvases to probabilities.
Run = Callable[[UInt8[np.ndarray, "b h w 3"]], Float[np.ndarray, "b C"]]

#: Name of each format's file.
FILES: dict[Format, str] = {
    "onnx": "model.onnx", "torch-export": "model.pt2", "safetensors": "model.safetensors"
}  # fmt: skip
assert set(FILES) == set(get_args(Format))
#: Names of the graph's input and output.
INPUT, OUTPUT = "canvas", "probabilities"
_OPSET = 18
#: Weights of more bytes PyTorch writes into a second file beside an ONNX one, whatever it is told.
_LARGEST = 1536 * 2**20


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


def check(format: Format) -> None:
    """Raise `UserError` where what a format needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if format == "onnx" and missing:
        raise UserError(
            f'--format onnx: {", ".join(missing)} is not installed; pip install -e ".[onnx]" installs what it needs.'
        )


def write(format: Format, deployed: Deployed, file: Path, about: Mapping[str, object]) -> None:
    """Write a model, on the CPU and in evaluation mode, to a file; `about` is kept in it as JSON.

    Raises:
        RuntimeError, ValueError: the format cannot hold this model.
    """
    facts = {"fastddr": json.dumps(about)}
    if format == "safetensors":
        # Those of the bare model: a regression's thresholds stand in the file's facts.
        state = grading.unwrap(deployed.model)[0].state_dict()
        tensors = {key: value.contiguous() for key, value in state.items()}
        file.write_bytes(save(tensors, facts))
        return
    held = sum(tensor.nbytes for tensor in deployed.state_dict().values())
    if format == "onnx" and held > _LARGEST:
        raise ValueError(f"its weights take {held / 2**30:.2f} GiB, and one file holds {_LARGEST / 2**30:.2f} GiB")
    height, width = deployed.canvas, deployed.canvas + 8
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    # The batch and both sides may have any size, as long as a window fits.
    dynamic = {INPUT: dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)}
    with _quiet():
        if format == "torch-export":
            program = torch.export.export(deployed, (example,), dynamic_shapes=dynamic)
            torch.export.save(program, file, extra_files=facts)
            return
        graph = torch.onnx.export(
            deployed, (example,), dynamo=True, dynamic_shapes=dynamic, input_names=[INPUT], output_names=[OUTPUT],
            opset_version=_OPSET, verbose=False,
        )  # fmt: skip
        assert graph is not None
        graph.model.metadata_props.update(facts)
        # Whole in one file: a second one with the weights would get lost.
        graph.save(file, external_data=False)


def read(format: Format, file: Path, rebuild: Callable[[], nn.Module], deployed: Deployed) -> Run:
    """The file as a function, by nothing but what is in it; of safetensors, in a new model that `rebuild` makes.

    Raises:
        RuntimeError, ValueError: it cannot be read.
        UserError: onnxruntime cannot read it or, from the function, not run it.
    """
    if format == "onnx":
        import onnxruntime

        with _onnxruntime():
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

        def answer(canvas: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b C"]:
            with _onnxruntime():
                return session.run([OUTPUT], {INPUT: canvas})[0]

        return answer
    network: nn.Module
    if format == "torch-export":
        with _quiet():
            network = torch.export.load(file).module()
    else:
        network = Deployed(rebuild(), deployed.config)
        grading.unwrap(network.model)[0].load_state_dict(load_file(file), strict=True)
        network.eval()

    def run(canvas: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b C"]:
        with torch.inference_mode():
            return network(torch.from_numpy(canvas)).numpy()

    return run


@contextmanager
def _onnxruntime() -> Iterator[None]:
    """Within it onnxruntime's errors, which have no kind in common, are `UserError`."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    try:
        yield
    except kinds as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--format onnx: onnxruntime does not run the file ({reason}), so it is not kept; take another --format."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters remark on themselves; what they cannot do is an exception."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
