"""The endpoint of a typical tutorial, to compare serve with: it calls the model in each request."""

import torch
from fastapi import Body, FastAPI

import lesson_code as lesson
from real_world.common import OUTPUT


def create_app() -> FastAPI:
    """Return the app; uvicorn calls this in every worker."""
    model, _, _ = lesson.load_checkpoint(OUTPUT / "lesson.pt")
    app = FastAPI()

    @app.post("/predict")
    async def predict(features: list[list[float]] = Body(embed=True)) -> dict:  # noqa: B008
        classes, probabilities = lesson.predict(model, torch.tensor(features))
        return {"classes": classes.tolist(), "probabilities": probabilities.tolist()}

    return app
