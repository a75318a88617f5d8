"""The article's code stands in lesson_code.py letter by letter, white space aside."""

import re
from pathlib import Path

import pytest

LESSON = Path(__file__).resolve().parents[1] / "lesson_code.py"

SNIPPETS = [
    """
    pip install torch torchvision torchaudio --index-url https://download.pytorch.org/whl/cpu
    pip install matplotlib numpy
    python -c "import torch; print(torch.__version__)"
    """,
    "import torch",
    """
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    print(x.shape) # torch.Size([2, 2])
    print(x.dtype) # torch.float32
    """,
    """
    w = torch.tensor(2.0, requires_grad=True)
    loss = (w * 3 - 9) ** 2 # (6 - 9)^2 = 9
    loss.backward()
    print(w.grad) # tensor(-18.) — d(loss)/dw
    """,
    "import torch.nn as nn",
    """
    class SimpleNet(nn.Module):
    def __init__(self):
    super().__init__()
    self.linear = nn.Linear(4, 2)
    def forward(self, x):
    return self.linear(x)
    """,
    """
    optimizer.zero_grad() # 1. Clear gradients from previous step
    outputs = model(X) # 2. Forward pass
    loss = criterion(outputs, y) # 3. Compute loss
    loss.backward() # 4. Backpropagation
    optimizer.step() # 5. Update weights
    """,
    """
    # Run from the day144_pytorch/ directory
    pytest test_lesson.py -v
    """,
    # Step 2: "Implement and verify each of the following", and what step 3 names.
    "torch.zeros(",
    "torch.ones(",
    "torch.randn(",
    "torch.matmul(a, b)",
    "a.reshape(rows, cols)",
    'a.to("cpu")',
    'a.to("cuda")',
    "torch.cuda.is_available()",
    "w.grad.zero_()",
    "nn.CrossEntropyLoss()",
    "torch.randint(",
    "for epoch in range(epochs): # 100 in the article",
]


def without_space(text: str) -> str:
    """Return the text without white space, and without the `#` that starts a comment line."""
    return re.sub(r"\s", "", re.sub(r"^\s*#", "", text, flags=re.MULTILINE))


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_stands_in_the_lesson(snippet):
    assert without_space(snippet) in without_space(LESSON.read_text(encoding="utf-8"))
