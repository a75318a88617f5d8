"""PyTorch in five steps: the code of the article "Day 144: PyTorch". Section N is its step N.

    python lesson_code.py                run all five sections; save checkpoints/lesson.pt and .png
    python lesson_code.py --section 3    run one section
The article's repository: https://github.com/sysdr/aiml-p/tree/main/day144/day144_pytorch
"""

import argparse
import contextlib
import math
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

IN_NOTEBOOK = __name__ == "__main__" and "ipykernel" in sys.modules
OUTPUT = (Path() if IN_NOTEBOOK else Path(__file__).parent) / "checkpoints"
DEFAULTS = argparse.Namespace(device="auto", epochs=100, seed=0, output=OUTPUT, no_figure=False)
SECTIONS: list[Callable[[argparse.Namespace], None]] = []
Device = torch.device | str


def section(run: Callable) -> Callable:
    """Register a section of the lesson. In a notebook, run it: its cell shows the output."""
    SECTIONS.append(run)
    if IN_NOTEBOOK:
        run(DEFAULTS)
    return run


class CheckFailed(Exception):
    """A check of the lesson did not pass."""


def check(label: str, value: object, passed: bool | torch.Tensor) -> None:
    """Print a label, a value and `ok`; raise CheckFailed if the check did not pass."""
    print(f"  {label:<32} {value!s:<42} {'ok' if passed else 'FAILED'}")
    if not passed:
        raise CheckFailed(f"check failed: {label} (got {value})")


@contextlib.contextmanager
def mistake(error_type: type[Exception], match: str, meaning: str) -> Iterator[None]:
    """Run a `with` block that makes a common mistake; print PyTorch's error and what it means."""
    try:
        yield
    except error_type as error:
        if match not in str(error):
            raise
        print(f"  {type(error).__name__}: {str(error).partition('. ')[0]}\n    -> {meaning}")
    else:
        raise CheckFailed(f"check failed: no {error_type.__name__} was raised ({meaning})")


# %% Section 1: Environment setup
# `./setup.sh` installs all that the lesson needs: torch, numpy, matplotlib and pytest. By hand:
#
#     pip install torch torchvision torchaudio --index-url https://download.pytorch.org/whl/cpu
#     pip install matplotlib numpy
#     python -c "import torch; print(torch.__version__)"
def select_device(name: str = "auto") -> torch.device:
    """Return a device; `auto` is CUDA if available, otherwise the CPU. Raises ValueError."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.append("mps")
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda" if "cuda" in available else "cpu"
    if name not in available:
        raise ValueError(f"{name!r} is not available (choose from auto, {', '.join(available)})")
    return torch.device(name)


@section
def environment_setup(options):
    check("torch.__version__", torch.__version__, torch.__version__ >= (2, 3))
    print(f"  torch.cuda.is_available(): {torch.cuda.is_available()}")
    print(f"  device of this run: {select_device(options.device)}")
    with mistake(RuntimeError, "device type", "a GPU is called cuda, or mps on a Mac"):
        torch.ones(3, device="gpu")
    with mistake(Exception, "", "there is no such GPU, or this PyTorch was built without CUDA"):
        torch.ones(3).to("cuda:99")


# %% Section 2: Tensor operations
# A tensor is an array with a shape, a dtype and a device. If an operation fails, print all three.
@section
def tensor_operations(options):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    print(x.shape)  # torch.Size([2, 2])
    print(x.dtype)  # torch.float32
    print(x.device)  # cpu
    check("x", "2 x 2, float32", x.shape == (2, 2) and x.dtype == torch.float32)
    scalar = torch.tensor(3.0)
    vector = torch.tensor([1.0, 2.0, 3.0])
    image = torch.zeros(3, 32, 32)  # (channels, height, width)
    images = torch.zeros(8, 3, 32, 32)  # (batch, channels, height, width)
    dims = [tensor.ndim for tensor in (scalar, vector, x, image, images)]
    check("scalar, vector, x, image, images", f"{dims} dimensions", dims == [0, 1, 2, 3, 4])
    torch.manual_seed(0)  # the same random numbers in every run
    zeros = torch.zeros(2, 3)
    ones = torch.ones(2, 3)
    noise = torch.randn(100, 100)
    mean, std = noise.mean().item(), noise.std().item()
    check("torch.zeros, torch.ones", "all 0, all 1", (zeros == 0).all() and (ones == 1).all())
    check("torch.randn", f"mean {mean:.2f}, std {std:.2f}", abs(mean) < 0.1 and abs(std - 1) < 0.1)

    a = torch.arange(6.0).reshape(2, 3)
    b = torch.arange(12.0).reshape(3, 4)
    product = torch.matmul(a, b)  # or a @ b: (2, 3) times (3, 4) is (2, 4)
    print(product)
    check("torch.matmul(a, b)", "equal to NumPy's", np.array_equal(product, a.numpy() @ b.numpy()))
    with mistake(RuntimeError, "cannot be multiplied", "b has 4 columns, but a has 2 rows"):
        torch.matmul(b, a)
    # reshape returns a view, without a copy, if the strides of the tensor allow it, as those of a
    # contiguous tensor always do. To flatten a transpose it has to copy; view raises an error.
    rows, cols = 3, 2
    reshaped = a.reshape(rows, cols)
    flattened = a.T.reshape(rows * cols)
    a[0, 0] = 100
    check("a.reshape(rows, cols)", "shares the memory of a", reshaped[0, 0] == 100)
    check("a.T.reshape(rows * cols)", "is a copy", flattened[0] == 0)
    with mistake(RuntimeError, "is not compatible", "a.T is not contiguous; use reshape"):
        a.T.view(rows * cols)

    check('a.to("cpu")', "is on the CPU already: not copied", a.to("cpu") is a)
    on_device = a.to(select_device(options.device))
    result = on_device @ on_device.T  # computed on the device
    check(f"a @ a.T, on {on_device.device}", "as on the CPU", result.cpu().equal(a @ a.T))
    if torch.cuda.is_available():
        with mistake(RuntimeError, "same device", "one tensor is on the GPU, one on the CPU"):
            a.to("cuda") @ a.T
    array = np.zeros(2)
    shared = torch.from_numpy(array)
    array[0] = 7
    check("torch.from_numpy(array)", "shares the memory of array", shared[0] == 7)
    x = torch.zeros(2)
    y = x.add(1)
    x.add_(2)
    check("y = x.add(1); x.add_(2)", "add returns y, add_ changes x", y[0] == 1 and x[0] == 2)


# %% Section 3: Autograd walkthrough
# PyTorch records every operation on a tensor with `requires_grad=True` in a directed acyclic graph.
# `backward()` traverses it from the loss to the leaves, the tensors that you created (here w), and
# applies the chain rule at every node. AccumulateGrad, the last node, adds to the leaf's `.grad`.
def recorded_graph(result: torch.Tensor) -> list[str]:
    """Return the names of a graph's nodes, from the result to a leaf, along their first input."""
    names, node = [], result.grad_fn
    while node is not None:
        names.append(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    return names


def gradient_descent(zero_grad: bool = True) -> tuple[list[float], list[float], list[float]]:
    """Minimize (w * 3 - 9) ** 2; return 21 values of w, and 20 losses and gradients."""
    w = torch.tensor(2.0, requires_grad=True)
    w_history, losses, grads = [2.0], [], []
    for _ in range(20):
        loss = (w * 3 - 9) ** 2
        loss.backward()
        losses.append(loss.item())
        grads.append(w.grad.item())
        with torch.no_grad():  # do not record the update
            w -= 0.03 * w.grad  # the learning rate is 0.03
        if zero_grad:  # without it, the next backward() adds to this gradient, a common bug
            w.grad.zero_()  # the trailing underscore denotes an in-place operation
        w_history.append(w.item())
    return w_history, losses, grads


def data_dependent(x: torch.Tensor) -> torch.Tensor:
    """Halve x until it is in [-1, 1]; return its square if it is positive, otherwise its sine."""
    while x.abs() > 1:
        x = x / 2
    return x**2 if x > 0 else x.sin()


# %%
@section
def autograd_walkthrough(options):
    w = torch.tensor(2.0, requires_grad=True)
    loss = (w * 3 - 9) ** 2  # (6 - 9)^2 = 9
    loss.backward()
    print(w.grad)  # tensor(-18.) — d(loss)/dw
    check("by hand: 2 * (2 * 3 - 9) * 3", -18, w.grad == -18)
    with mistake(RuntimeError, "second time", "the graph was freed; compute the loss again"):
        loss.backward()
    with mistake(RuntimeError, "requires grad", "NumPy has no autograd; use w.detach().numpy()"):
        w.numpy()

    product = w * 3
    difference = product - 9
    loss = difference**2
    tensors = {"loss": loss, "difference": difference, "product": product, "w": w}
    grads = torch.autograd.grad(loss, list(tensors.values()))  # returns them, and sets no .grad
    print("  tensor      value  d(loss)/d(tensor)  node")
    for (name, t), grad, node in zip(tensors.items(), grads, recorded_graph(loss), strict=True):
        print(f"  {name:<12}{t.item():>5.0f}{grad.item():>19.0f}  {node}")

    good = gradient_descent()
    bad = gradient_descent(zero_grad=False)
    print("                  with w.grad.zero_()       without w.grad.zero_()")
    print("  iteration        w     loss  gradient        w     loss  gradient")
    for i in (0, 1, 2, 3, 4, 9, 14, 19):
        columns = [f"{ws[i]:>9.4f}{ls[i]:>9.4f}{gs[i]:>10.4f}" for ws, ls, gs in (good, bad)]
        print(f"{i + 1:>11}", *columns, sep="")
    check("after 20 iterations", f"w = {good[0][-1]:.6f}", abs(good[0][-1] - 3) < 1e-5)
    low, high = min(bad[0][-10:]), max(bad[0][-10:])
    check("without zero_()", f"w oscillates, {low:.2f} to {high:.2f}", low < 2 and high > 4)
    with mistake(RuntimeError, "leaf Variable", "autograd would record this; use torch.no_grad()"):
        w -= 0.03 * w.grad
    with torch.no_grad():
        w = w - 0.03 * w.grad  # a new tensor, which does not require grad: its .grad is None
    with mistake(RuntimeError, "does not require grad", "the new w does not; use w -= ..."):
        ((w * 3 - 9) ** 2).backward()
    # The graph is dynamic: every forward pass records a new one, which can depend on the data.
    for value in (5.0, 0.5, -3.0):
        x = torch.tensor(value, dtype=torch.float64, requires_grad=True)  # float64 for gradcheck
        print(f"  x = {value}:", *recorded_graph(data_dependent(x)))
        check("gradient", "near finite differences", torch.autograd.gradcheck(data_dependent, x))


# %% Section 4: Build and train a two-layer network
# A model is a class: layers in `__init__`, the computation in `forward()`. Assigning a layer to
# `self` registers its parameters. A classifier returns logits, one score per class, which a softmax
# turns into probabilities; nn.CrossEntropyLoss applies the softmax itself.
class SimpleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x)


class SimpleClassifier(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, in_features: int = 4, hidden_size: int = 16, num_classes: int = 3):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_size)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden_size, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.fc1(x))  # (batch, in_features) -> (batch, hidden_size)
        return self.fc2(x)  # (batch, num_classes)


def build_model(seed: int, device: Device) -> tuple[SimpleClassifier, torch.optim.Optimizer]:
    """Return a SimpleClassifier with seeded weights on a device, and an Adam optimizer for it."""
    torch.manual_seed(seed)
    model = SimpleClassifier().to(device)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def make_synthetic_data(
    n: int = 100, in_features: int = 4, num_classes: int = 3, seed: int = 0, device: Device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features X, (n, in_features) float32, and random labels y, (n,) int64."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same data on every device
    X = torch.randn(n, in_features, generator=generator)
    y = torch.randint(0, num_classes, (n,), generator=generator)
    return X.to(device), y.to(device)


def train(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    epochs: int = 100,
    on_step: Callable[[int, torch.Tensor], object] | None = None,
) -> list[float]:
    """Train a model in place with the article's loop; return the loss of every step.

    `batches` yields pairs (X, y) on the model's device, in every epoch anew: [(X, y)] or a loader.
    `on_step(step, loss)` is called after every update, for example for a learning rate scheduler.
    """
    model.train()
    losses = []
    for epoch in range(epochs):  # 100 in the article
        for X, y in batches:  # one batch in the article
            optimizer.zero_grad()  # 1. Clear gradients from previous step
            outputs = model(X)  # 2. Forward pass
            loss = criterion(outputs, y)  # 3. Compute loss
            loss.backward()  # 4. Backpropagation
            optimizer.step()  # 5. Update weights
            losses.append(loss.detach())  # .item() would wait for the GPU in every step
            if on_step is not None:
                on_step(len(losses) - 1, losses[-1])
    return torch.stack(losses).tolist() if losses else []


@torch.no_grad()
def evaluate(model: nn.Module, X: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Return the cross-entropy loss and the accuracy of a model on X and y, in eval mode."""
    model.eval()
    logits = model(X)
    accuracy = (logits.argmax(dim=1) == y).float().mean()
    return nn.functional.cross_entropy(logits, y).item(), accuracy.item()


# %%
@section
def build_and_train_a_two_layer_network(options):
    check("SimpleNet, 3 samples", "3 x 2 logits", SimpleNet()(torch.randn(3, 4)).shape == (3, 2))
    device = select_device(options.device)
    model, optimizer = build_model(options.seed, device)
    for name, parameter in model.named_parameters():
        print(f"  {name:<12}{tuple(parameter.shape)}")
    check("SimpleClassifier, parameters", 131, sum(p.numel() for p in model.parameters()) == 131)
    unregistered = nn.Module()
    unregistered.layers = [nn.Linear(4, 16), nn.Linear(16, 3)]
    with mistake(ValueError, "empty parameter list", "a list registers nothing; use nn.ModuleList"):
        torch.optim.Adam(unregistered.parameters())

    X, y = make_synthetic_data(seed=options.seed, device=device)
    criterion = nn.CrossEntropyLoss()
    losses = train(model, [(X, y)], criterion, optimizer, options.epochs)
    for epoch, loss in enumerate(losses, start=1):
        if epoch % 10 == 0 or epoch == options.epochs:
            print(f"  epoch {epoch:>4}  loss {loss:.4f}")
    # Untrained, the model gives each class a probability of about 1/3: the loss is about ln 3.
    check("first loss", f"{losses[0]:.4f}, near ln 3 = 1.0986", abs(losses[0] - math.log(3)) < 0.3)
    if options.epochs > 1:
        start = torch.tensor(losses[:100])  # later, near a minimum, an update may overshoot
        check("monotonic decrease", f"{start[0]:.4f} to {start[-1]:.4f}", start.diff().max() < 0)
    # The labels are random: there is nothing to learn, only to memorize. On new data, the accuracy
    # is at chance level, and the loss is above ln 3, because the model is confident and wrong.
    X_test, y_test = make_synthetic_data(2000, seed=options.seed + 1, device=device)
    test_loss, test_accuracy = evaluate(model, X_test, y_test)
    print(f"  training accuracy {evaluate(model, X, y)[1]:.1%}, test loss {test_loss:.4f}")
    check("test accuracy", f"{test_accuracy:.1%}, chance 33.3%", abs(test_accuracy - 1 / 3) < 0.05)
    # On the CPU: on a GPU, the third of these mistakes would end all further work of this process.
    model, X, y = model.cpu(), X.cpu(), y.cpu()
    with mistake(RuntimeError, "same dtype", "X is float64, NumPy's default; use X.float()"):
        model(X.double())
    with mistake(RuntimeError, "Long", "y is float32; class labels are int64, use y.long()"):
        criterion(model(X), y.float())
    with mistake(IndexError, "out of bounds", "y has a 3; the labels of 3 classes are 0, 1 and 2"):
        criterion(model(X), y + 1)
    # A mistake without an error: a softmax before CrossEntropyLoss, which applies one itself. The
    # loss cannot approach 0: for perfect predictions, it is ln(1 + 2 / e) = 0.5514.
    perfect = 100 * torch.eye(3)  # logits of three samples, whose classes are 0, 1 and 2
    loss = criterion(perfect.softmax(dim=1), torch.arange(3)).item()
    check("softmax twice, lowest loss", f"{loss:.4f}", abs(loss - math.log(1 + 2 / math.e)) < 1e-4)


# %% Section 5: Verify, test and demo
# A checkpoint holds what is needed to use the model and to resume its training. Run the tests with:
#
#     # Run from the day144_pytorch/ directory
#     pytest test_lesson.py -v
class CheckpointError(Exception):
    """A checkpoint cannot be loaded."""


def save_checkpoint(
    path: Path | str, model: SimpleClassifier, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    """Save a checkpoint. If that fails (OSError, CheckpointError), the old file is unchanged."""
    content = {
        "sizes": (model.fc1.in_features, model.fc1.out_features, model.fc2.out_features),
        "model_state_dict": model.state_dict(),
        "optimizer": type(optimizer).__name__,
        "optimizer_state_dict": optimizer.state_dict(),
        "losses": [float(loss) for loss in losses],
    }
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            os.fsync(file.fileno())  # on the disk before it replaces the old file
        load_checkpoint(temporary)  # raises an error for a model or optimizer of another kind
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(
    path: Path | str, device: Device = "cpu"
) -> tuple[SimpleClassifier, torch.optim.Optimizer, list[float]]:
    """Return the model, the optimizer and the losses of a checkpoint; execute no code in it.

    Raises CheckpointError if the file is missing, damaged or not a checkpoint of this lesson.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load ignores checksums, skips folders
            if archive.testzip() or any(info.external_attr & 0x10 for info in archive.infolist()):
                raise zipfile.BadZipFile("a record is corrupted")
        content = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # shapes only: no memory, no random numbers
            model = SimpleClassifier(*content["sizes"])
        model.load_state_dict(content["model_state_dict"], assign=True)
        optimizer = getattr(torch.optim, content["optimizer"])(model.to(device).parameters())
        optimizer.load_state_dict(content["optimizer_state_dict"])
        return model, optimizer, list(content["losses"])
    except Exception as error:  # a damaged file can raise any exception
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]
        raise CheckpointError(f"cannot load {path} ({reason})") from error


@torch.no_grad()
def predict(model: nn.Module, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return classes, (batch,) int64, and probabilities, (batch, num_classes), in eval mode."""
    model.eval()
    probabilities = model(X).softmax(dim=1)
    return probabilities.argmax(dim=1), probabilities


def plot_lesson(path: Path, losses: list[float], test_loss: float) -> None:
    """Plot gradient descent with and without zero_(), and the losses, as a PNG."""
    from matplotlib.figure import Figure  # imported only here: it takes half a second

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    descent, training = figure.subplots(1, 2)
    descent.set(title="Gradient descent: w", xlabel="iteration", ylim=(1.5, 5), xticks=[0, 10, 20])
    descent.plot(gradient_descent(zero_grad=False)[0], "o--", color="C1", label="without zero_()")
    descent.plot(gradient_descent()[0], "o-", color="C0", label="with w.grad.zero_()")
    training.set(title="Training on random labels", xlabel="epoch", ylabel="cross-entropy loss")
    training.plot(range(1, len(losses) + 1), losses, label="training loss")
    training.plot(len(losses), test_loss, "s", label="test loss, after training")
    training.axhline(math.log(3), color="grey", ls=":", label="chance level, ln 3")
    for axes in (descent, training):
        axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)
    if IN_NOTEBOOK:
        from IPython.display import Image, display

        display(Image(path, alt="w by iteration; training loss by epoch"))


# %%
@section
def verify_test_and_demo(options):
    device = select_device(options.device)
    batches = [make_synthetic_data(seed=options.seed, device=device)]
    X_test, y_test = make_synthetic_data(2000, seed=options.seed + 1, device=device)
    criterion = nn.CrossEntropyLoss()
    model, optimizer = build_model(options.seed, device)
    uninterrupted = train(model, batches, criterion, optimizer, options.epochs)

    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "lesson.pt"
    model, optimizer = build_model(options.seed, device)
    losses = train(model, batches, criterion, optimizer, options.epochs // 2)
    save_checkpoint(path, model, optimizer, losses)
    loaded, optimizer, losses = load_checkpoint(path, device)
    same = predict(loaded, X_test)[1].equal(predict(model, X_test)[1])
    check("loaded from a checkpoint", "the same predictions, bit for bit", same)
    losses += train(loaded, batches, criterion, optimizer, options.epochs - len(losses))
    check("resumed from the checkpoint", "the losses of one whole run", losses == uninterrupted)
    with mistake(TypeError, "dict-like", "it takes a state dict; torch.load() the path first"):
        model.load_state_dict(path)
    with mistake(Exception, "Weights only", "a pickled model can run code; save its state_dict()"):
        torch.save(model, path)  # replaced below by a checkpoint
        torch.load(path, weights_only=True)  # the default since PyTorch 2.6

    save_checkpoint(path, loaded, optimizer, losses)
    print("  saved", path)
    classes, probabilities = predict(loaded, X_test[:4])
    for label, row in zip(classes.tolist(), probabilities.tolist(), strict=True):
        print(f"  class {label}, probabilities", " ".join(f"{value:6.1%}" for value in row))
    if not options.no_figure:
        path = options.output / "lesson.png"
        plot_lesson(path, losses, evaluate(loaded, X_test, y_test)[0])
        print("  saved", path)


# %% Command line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the lesson as a script; return 0, 1 if something failed, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="lesson_code.py", description="PyTorch in five steps.")
    add = parser.add_argument
    add("--section", metavar="N", type=int, nargs="+", choices=range(1, 6), help="default: all")
    add("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--epochs", metavar="N", type=int, help="epochs of training (default: 100)")
    add("--seed", metavar="N", type=int, help="seed of the data and the weights (default: 0)")
    add("--output", metavar="DIR", type=lambda s: Path(s).expanduser(), help="default: checkpoints")
    add("--no-figure", action="store_true", help="do not plot lesson.png")
    add("--pause", action="store_true", help="wait for Enter after every section")
    parser.set_defaults(**vars(DEFAULTS))
    options = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # for a path that an ASCII terminal cannot print
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if options.epochs < 1:
        parser.error("argument --epochs: must be at least 1")
    try:
        select_device(options.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    try:
        for number in sorted(set(options.section or range(1, 6))):
            run = SECTIONS[number - 1]
            print(f"\nSection {number}: {run.__name__.replace('_', ' ')}\n{'-' * 47}")
            run(options)
            if options.pause:
                input("\nPress Enter to continue ")
    except (KeyboardInterrupt, BrokenPipeError, EOFError):  # Ctrl-C, `| head`, no input
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discard what is still buffered
        return 130
    except (CheckFailed, CheckpointError, OSError) as error:
        print(f"lesson_code.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__" and not IN_NOTEBOOK:
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)  # not the user's settings
    torch.set_num_threads(1)  # on a busy computer, more threads wait for each other
    sys.exit(main())
