"""The model in LitServe, with dynamic batching, for comparison with serve."""

import argparse

import litserve
import torch

import lesson_code as lesson
from real_world.common import OUTPUT


class Predict(litserve.LitAPI):
    """LitServe calls the methods in this order."""

    def setup(self, device: str) -> None:
        """Load the model, in each worker."""
        torch.set_num_threads(1)  # the workers share the cores
        self.model, _, _ = lesson.load_checkpoint(OUTPUT / "lesson.pt", device)

    def decode_request(self, request: dict) -> torch.Tensor:
        """Return the features of a request, (rows, 4)."""
        return torch.tensor(request["features"], dtype=torch.float32)

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Return the rows of all requests of a batch."""
        self.rows = [len(features) for features in inputs]
        return torch.cat(inputs)

    def predict(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the classes and the probabilities of all rows."""
        return lesson.predict(self.model, x)

    def unbatch(self, output: tuple[torch.Tensor, torch.Tensor]) -> list:
        """Split the output by request."""
        classes, probabilities = output
        return list(zip(classes.split(self.rows), probabilities.split(self.rows), strict=True))

    def encode_response(self, output: tuple[torch.Tensor, torch.Tensor]) -> dict:
        """Return the JSON response."""
        classes, probabilities = output
        return {"classes": classes.tolist(), "probabilities": probabilities.tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--workers", type=int)
    args = parser.parse_args()
    api = Predict(max_batch_size=64, batch_timeout=0.001)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=args.workers, fast_queue=True
    )
    server.run("127.0.0.1", args.port, log_level="warning", generate_client_file=False)
