"""The article's code stands in lesson_code.py, and the comments there say what it prints."""

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import lesson_code as lesson

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


def test_comments_say_what_is_printed(tmp_path, monkeypatch):
    """`print(...)  # what it prints — why`, without labels, and with `...` for what is left out."""
    printed = defaultdict(list)  # by line number

    def record(*values: object, sep: str = " ", **options: object) -> None:
        printed[sys._getframe(1).f_lineno].append(sep.join(map(str, values)))

    monkeypatch.setattr(lesson, "print", record, raising=False)
    lesson.main(["--device", "cpu", "--output", str(tmp_path)])
    comments = 0
    for number, line in enumerate(LESSON.read_text(encoding="utf-8").splitlines(), start=1):
        if comment := re.fullmatch(r" *print\(.*\)  # (.*)", line):
            comments += 1
            pattern = re.escape(comment[1].split(" — ")[0]).replace(re.escape("..."), ".*")
            text = re.sub(r"\s+", " ", "".join(printed[number]))
            assert re.search(f"(^|[ :]){pattern}$", text), f"line {number} prints {text!r}"
    assert comments >= 25
