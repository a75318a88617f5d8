"""PyTorch in five steps: the code of the article "Day 144: PyTorch". Section N is its step N.

The comment after a `print()` is its output. A `try` in a section shows a mistake. In a terminal:

    python lesson_code.py                run all five sections; save checkpoints/lesson.pt and .png
    python lesson_code.py --section 3    run one section
"""

import argparse
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.types import Device
from torch.utils.data import DataLoader, TensorDataset


# %% Section 1: Environment setup
# `./setup.sh` installs everything. By hand, in a virtual environment (the tests need pytest, too):
#
#     pip install torch torchvision torchaudio --index-url https://download.pytorch.org/whl/cpu
#     pip install matplotlib numpy
#     python -c "import torch; print(torch.__version__)"
def select_device(name: str = "auto") -> torch.device:
    """Return a device; `auto` is cuda or cpu. Raises ValueError if it is not available."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available += ["mps", "mps:0"]  # an Apple GPU
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda" if "cuda" in available else "cpu"
    if name not in available:
        raise ValueError(f"{name!r} is not available (choose from auto, {', '.join(available)})")
    return torch.device(name)


def environment_setup(device: torch.device):
    print(f"{torch.__version__ = }")
    print(f"{torch.cuda.is_available() = }")
    print(f"{device = }")
    assert torch.__version__ >= (2, 3), "the lesson needs PyTorch 2.3 or higher"


# %% Section 2: Tensor operations
# A tensor is an array with a shape, a dtype and a device. If an operation fails, print all three.
def tensor_operations(device: torch.device):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    print(x.shape)  # torch.Size([2, 2])
    print(x.dtype)  # torch.float32
    print(x.device)  # cpu
    scalar = torch.tensor(3.0)
    vector = torch.zeros(3)
    images = torch.ones(8, 3, 32, 32)  # (batch, channels, height, width)
    print("dimensions:", scalar.ndim, vector.ndim, x.ndim, images[0].ndim, images.ndim)  # 0 1 2 3 4
    print("zeros and ones:", vector, torch.ones(3))  # tensor([0., 0., 0.]) tensor([1., 1., 1.])
    torch.manual_seed(0)  # the same random numbers in every run
    noise = torch.randn(10_000)  # from the standard normal distribution
    print(f"noise: mean {noise.mean():.2f}, std {noise.std():.2f}")  # mean -0.01, std 1.00
    # The matrix product is the core of every linear layer, which computes x @ weight.T + bias.
    a = torch.arange(6.0).reshape(2, 3)
    b = torch.arange(6.0).reshape(3, 2)
    product = torch.matmul(a, b)  # or a @ b: (2, 3) times (3, 2) is (2, 2)
    print("product:", product, sep="\n")  # tensor([[10., 13.], [28., 40.]])
    try:
        torch.matmul(a, a)
    except RuntimeError as error:  # the first has 3 columns, but the second has 2 rows
        print("matmul(a, a):", error)  # mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)
    # `reshape()` copies only if it has to. Here, the result is a view, which shares a's memory.
    rows, cols = 3, 2
    view = a.reshape(rows, cols)
    view[0, 0] = 100
    print("after view[0, 0] = 100:", a[0, 0])  # tensor(100.)
    flat = a.T.reshape(6)  # the elements of a.T are not in row order in memory: a copy
    flat[0] = -1
    print("after flat[0] = -1:", flat[0], a[0, 0])  # tensor(-1.) tensor(100.)
    # An operation runs on the device of its tensors, and its result is there, too.
    moved = a.to(device)  # a.to("cuda") copies a to the GPU; a.to("cpu") returns a itself
    print("moved @ moved.T is on", (moved @ moved.T).device)
    try:
        a.to("cuda") @ a.T
    except (RuntimeError, AssertionError) as error:  # a.T is still on the CPU; or no CUDA
        print('a.to("cuda") @ a.T:', error)


# %% Section 3: Autograd walkthrough
# PyTorch records every operation on a tensor with `requires_grad=True` in a directed acyclic graph.
# `backward()` traverses it from the loss to the leaves, the tensors that you created, applying the
# chain rule at every node. AccumulateGrad, the last node, adds the result to the leaf's `.grad`.
def recorded_graph(result: torch.Tensor) -> list[str]:
    """Return the names of the graph's nodes, from `result` to a leaf, along each first input."""
    names = []
    node = result.grad_fn  # it computes the gradient of the last operation
    while node is not None:
        names.append(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    return names


def gradient_descent(zero_grad: bool = True) -> tuple[list[float], list[float], list[float]]:
    """Minimize (w * 3 - 9) ** 2; return w (first its initial value), losses and gradients."""
    w = torch.tensor(2.0, requires_grad=True)
    w_history, losses, grads = [2.0], [], []
    for _ in range(20):
        loss = (w * 3 - 9) ** 2
        loss.backward()  # adds d(loss)/dw to w.grad
        losses.append(loss.item())
        grads.append(w.grad.item())
        with torch.no_grad():  # do not record the update
            w -= 0.03 * w.grad  # the learning rate is 0.03
        if zero_grad:  # otherwise, the next backward() adds to this gradient: a common bug
            w.grad.zero_()  # the trailing underscore denotes an in-place operation
        w_history.append(w.item())
    return w_history, losses, grads


def autograd_walkthrough():
    w = torch.tensor(2.0, requires_grad=True)
    loss = (w * 3 - 9) ** 2  # (6 - 9)^2 = 9
    loss.backward()
    print(w.grad)  # tensor(-18.) — d(loss)/dw
    print("graph:", *recorded_graph(loss))  # PowBackward0 SubBackward0 MulBackward0 AccumulateGrad
    print("chain rule:", 2 * (2 * 3 - 9) * 1 * 3)  # -18 — the derivatives of ** 2, - 9 and * 3
    try:
        loss.backward()
    except RuntimeError as error:  # the graph was freed: compute the loss again
        print("backward() again:", error)  # Trying to backward through the graph a second time ...
    try:
        w.numpy()
    except RuntimeError as error:  # NumPy has no autograd
        print("w.numpy():", error)  # Can't call numpy() on Tensor that requires grad. ...
    try:
        w -= 0.03 * w.grad
    except RuntimeError as error:  # autograd would record the update: use torch.no_grad()
        print("w -= ...:", error)  # a leaf Variable that requires grad is being used in an ...
    # Gradient descent by hand: compute the loss and its gradient, then w -= lr * gradient.
    good = gradient_descent()
    bad = gradient_descent(zero_grad=False)
    print("                with w.grad.zero_()       without w.grad.zero_()")
    print("iteration        w     loss  gradient        w     loss  gradient")
    for i in (0, 1, 2, 3, 4, 5, 10, 19):
        columns = [f"{ws[i]:>9.4f}{ls[i]:>9.4f}{gs[i]:>10.4f}" for ws, ls, gs in (good, bad)]
        print(f"{i:>9}", *columns, sep="")
    # An optimizer updates all tensors that it is given. The `step()` of SGD is w -= lr * w.grad.
    w = torch.tensor(2.0, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.03)  # stochastic gradient descent
    w_history = [2.0]
    for _ in range(20):
        optimizer.zero_grad()
        loss = (w * 3 - 9) ** 2
        loss.backward()
        optimizer.step()
        w_history.append(w.item())
    print("SGD gives the same 21 values of w:", w_history == good[0])  # True
    # The graph is dynamic: every forward pass records a new one, which can depend on the data.
    for value in (5.0, 0.5, -3.0):
        x = torch.tensor(value, requires_grad=True)
        while x.abs() > 1:
            x = x / 2
        y = x**2 if x > 0 else x.sin()
        print(f"graph for x = {value}:", *recorded_graph(y))


# %% Section 4: Build and train a two-layer network
# A model is a class: layers in `__init__`, the computation in `forward()`, which `model(X)` calls.
# Assigning a layer to `self` registers its parameters, the weights and biases to be trained.
class SimpleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x)


class SimpleClassifier(nn.Module):
    """Two linear layers with a ReLU between them. Returns logits: one score per class."""

    def __init__(self, in_features: int = 4, hidden_size: int = 16, num_classes: int = 3):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_size)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden_size, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.fc1(x))  # (batch, in_features) -> (batch, hidden_size)
        return self.fc2(x)  # (batch, num_classes)


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

    `batches` is a DataLoader or a list of pairs (X, y) on the model's device; a generator would be
    empty after the first epoch. `on_step(step, loss)` is called after every step.
    """
    model.train()  # training mode, for layers such as dropout
    losses = []
    for epoch in range(epochs):  # 100 in the article
        for X, y in batches:  # one batch in the article
            optimizer.zero_grad()  # 1. Clear gradients from previous step
            outputs = model(X)  # 2. Forward pass
            loss = criterion(outputs, y)  # 3. Compute loss
            loss.backward()  # 4. Backpropagation
            optimizer.step()  # 5. Update weights
            losses.append(loss.detach())  # without its graph; .item() would wait for the GPU
            if on_step is not None:
                on_step(len(losses) - 1, losses[-1])
    return torch.stack(losses).tolist() if losses else []


@torch.no_grad()  # record no graph: there will be no backward()
def evaluate(model: nn.Module, X: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Return the cross-entropy loss and the accuracy on X and y; leave the model in eval mode."""
    if y.ndim != 1:
        raise ValueError(f"y must be (batch,), one class index per sample, got {tuple(y.shape)}")
    model.eval()
    logits = model(X)
    accuracy = (logits.argmax(dim=1) == y).float().mean()
    return nn.functional.cross_entropy(logits, y).item(), accuracy.item()


def build_and_train(device: torch.device, epochs: int = 100, seed: int = 0):
    model = SimpleClassifier()  # to look at it
    print(model)
    print("parameters:", sum(parameter.numel() for parameter in model.parameters()))  # 131
    print("logits, 5 samples:", model(torch.ones(5, 4)).shape)  # torch.Size([5, 3])
    simple_net = SimpleNet()
    simple_net.layers = [nn.Linear(2, 2)]  # a mistake: a list registers nothing; use nn.ModuleList
    print("registered:", list(simple_net.state_dict()))  # ['linear.weight', 'linear.bias']

    # A step is one update of the parameters, from a batch of samples (here all 100); an epoch is a
    # pass over all samples. The criterion computes the loss: CrossEntropyLoss turns logits into
    # probabilities (softmax), and takes the mean of -ln(probability of the label).
    torch.manual_seed(seed)  # the same initial weights in every run
    model = SimpleClassifier().to(device)
    X, y = make_synthetic_data(seed=seed, device=device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)  # adapts lr for each parameter
    losses = train(model, [(X, y)], criterion, optimizer, epochs)
    for epoch in [*range(10, epochs, 10), epochs]:
        print(f"epoch {epoch:>4}  loss {losses[epoch - 1]:.4f}")
    for epoch in range(2, min(epochs, 100) + 1):  # later, near a minimum, an update may overshoot
        before, after = losses[epoch - 2 : epoch]
        assert after < before, f"in epoch {epoch}, the loss went from {before:.4f} to {after:.4f}"
    # Random labels can only be memorized: on new samples, the accuracy is at chance level.
    X_test, y_test = make_synthetic_data(2000, seed=seed + 1, device=device)
    print(f"chance level: loss {math.log(3):.2f}, accuracy {1 / 3:.0%}")  # loss 1.10, accuracy 33%
    loss, accuracy = evaluate(model, X, y)
    print(f"training samples: loss {loss:.2f}, accuracy {accuracy:.0%}")  # loss 0.73, accuracy 66%
    loss, accuracy = evaluate(model, X_test, y_test)
    print(f"new samples: loss {loss:.2f}, accuracy {accuracy:.0%}")  # loss 1.52, accuracy 34%

    # Labels that follow a rule can be learned: here, which of the first three features is largest.
    # A DataLoader divides 100 samples into 5 mini-batches of 20, reshuffled in every epoch.
    torch.manual_seed(seed)
    model = SimpleClassifier().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    dataset = TensorDataset(X, X[:, :3].argmax(dim=1))
    train(model, DataLoader(dataset, 20, shuffle=True), criterion, optimizer, epochs)
    loss, accuracy = evaluate(model, X_test, X_test[:, :3].argmax(dim=1))
    print(f"learned rule, new samples: loss {loss:.2f}, accuracy {accuracy:.0%}")  # loss 0.09, ...
    # In training mode, Dropout(0.5) zeroes each input with probability 0.5, and doubles the others.
    dropout = nn.Dropout(0.5)
    torch.manual_seed(0)
    print("training mode:", dropout(torch.ones(4)), dropout(torch.ones(4)))
    dropout.eval()
    print("eval mode:", dropout(torch.ones(4)), dropout(torch.ones(4)))
    # Mistakes, on the CPU: on a GPU, a label out of bounds would leave the CUDA context unusable.
    cpu_model = SimpleClassifier()
    cpu_X, cpu_y = make_synthetic_data()
    try:
        cpu_model(torch.from_numpy(np.ones((5, 4))))
    except RuntimeError as error:  # NumPy's default dtype is float64: use X.float()
        print("float64 features:", error)  # mat1 and mat2 must have the same dtype, but got ...
    for wrong in (cpu_y.float(), cpu_y + 1):  # labels are int64, and of 3 classes, from 0 to 2
        try:
            criterion(cpu_model(cpu_X), wrong)
        except (RuntimeError, IndexError) as error:
            print(f"labels of {wrong.dtype}, up to {wrong.max():.0f}:", error)
    # No error, but a wrong loss: CrossEntropyLoss applies softmax itself, so give it logits.
    perfect = 100 * torch.eye(3)  # logits of samples whose labels are 0, 1 and 2: the loss is 0
    print("softmax twice:", criterion(perfect.softmax(dim=1), torch.arange(3)))  # tensor(0.5514)


# %% Section 5: Verify, test and demo
# A checkpoint holds what it takes to use a model and resume its training. Tests, in a terminal:
#
#     # Run from the day144_pytorch/ directory
#     pytest test_lesson.py -v
class CheckpointError(Exception):
    """A checkpoint cannot be saved or loaded."""


def save_checkpoint(
    path: Path | str, model: SimpleClassifier, optimizer: torch.optim.Adam, losses: list[float]
) -> None:
    """Save model, torch.optim.Adam and losses. If this fails, an existing file is unchanged.

    Raises OSError; and CheckpointError for other layers, parameters or optimizers. Hooks are lost.
    """
    layers = [type(module) for module in model.modules()]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    optimized = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    supported = [SimpleClassifier, nn.Linear, nn.ReLU, nn.Linear, torch.optim.Adam]
    if [*layers, type(optimizer)] != supported or optimized != trainable:
        raise CheckpointError("saves only a SimpleClassifier, and an Adam for all its parameters")
    content = {
        "sizes": (model.fc1.in_features, model.fc1.out_features, model.fc2.out_features),
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "losses": [float(loss) for loss in losses],
    }
    buffer = io.BytesIO()  # in memory: on a full disk, torch.save() raises RuntimeError
    torch.save(content, buffer)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        load_checkpoint(temporary)  # can it be loaded?
        temporary.replace(path)  # atomic
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(
    path: Path | str, device: Device = "cpu"
) -> tuple[SimpleClassifier, torch.optim.Adam, list[float]]:
    """Return model, optimizer and losses; execute no code. Raises CheckpointError, ValueError."""
    device = select_device(str(device))
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load() ignores checksums, and folders (0x10)
            if archive.testzip() or any(info.external_attr & 0x10 for info in archive.infolist()):
                raise zipfile.BadZipFile("a record is corrupted")
        content = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # no values yet; assign=True below puts in the saved ones
            model = SimpleClassifier(*content["sizes"])
        model.load_state_dict(content["model_state_dict"], assign=True)
        optimizer = torch.optim.Adam(model.to(device).parameters())  # lr is in the file
        optimizer.load_state_dict(content["optimizer_state_dict"])
        return model, optimizer, content["losses"]
    except Exception as error:  # a damaged file can raise any exception
        reason = " ".join(f"{type(error).__name__}: {error}".split()).partition(". ")[0]
        raise CheckpointError(f"cannot load {path} ({reason})") from error


@torch.no_grad()
def predict(model: nn.Module, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return classes, (batch,) int64, and probabilities, (batch, num_classes); sets eval mode."""
    model.eval()
    probabilities = model(X).softmax(dim=-1)
    return probabilities.argmax(dim=-1), probabilities


def plot_lesson(path: Path | str, losses: list[float], test_loss: float) -> None:
    """Plot gradient descent with and without zero_(), and the losses, as a PNG."""
    from matplotlib.figure import Figure  # imported only here: it takes half a second

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    descent, training = figure.subplots(1, 2)
    descent.set(title="Gradient descent: w", xlabel="iteration", ylim=(1.5, 5), xticks=[0, 10, 20])
    descent.plot(gradient_descent(zero_grad=False)[0], "o--", color="C1", label="without zero_()")
    descent.plot(gradient_descent()[0], "o-", color="C0", label="with w.grad.zero_()")
    training.set(title="Labels that follow a rule", xlabel="epoch", ylabel="loss", ylim=(0, 1.5))
    training.plot(range(1, len(losses) + 1), losses, label="training samples")
    training.plot(len(losses), test_loss, "s", label="new samples, after training")
    training.axhline(math.log(3), color="grey", ls=":", label="chance level: ln 3")
    for axes in (descent, training):
        axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)


def verify_test_and_demo(device: torch.device, epochs: int, seed: int, output: Path, plot: bool):
    # A model that learned the rule of section 4 predicts the same after loading, bit for bit.
    torch.manual_seed(seed)
    model = SimpleClassifier().to(device)
    X, _ = make_synthetic_data(seed=seed, device=device)
    batches = [(X, X[:, :3].argmax(dim=1))]
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = train(model, batches, criterion, optimizer, epochs)
    output.mkdir(parents=True, exist_ok=True)
    save_checkpoint(output / "lesson.pt", model, optimizer, losses)
    print("saved", output / "lesson.pt")
    loaded, loaded_optimizer, _ = load_checkpoint(output / "lesson.pt", device)
    print("same predictions:", predict(loaded, X)[1].equal(predict(model, X)[1]))  # True
    # The demo: new samples, whose class is the index of the largest of the first three features.
    X_test, _ = make_synthetic_data(2000, seed=seed + 1, device=device)
    loss, accuracy = evaluate(loaded, X_test, X_test[:, :3].argmax(dim=1))
    print(f"new samples: loss {loss:.2f}, accuracy {accuracy:.0%}")  # loss 0.11, accuracy 95%
    for x in X_test[:4]:
        predicted, probabilities = predict(loaded, x)
        print(f"{x}: class {predicted} ({probabilities[predicted]:.1%})")
    if plot:
        plot_lesson(output / "lesson.png", losses, loss)
        print("saved", output / "lesson.png")
    # The checkpoint also holds the optimizer state: resumed training has the same losses.
    more = train(model, batches, criterion, optimizer, 10)
    resumed = train(loaded, batches, criterion, loaded_optimizer, 10)
    print("same losses:", resumed == more)  # True
    # A mistake: saving the whole model. To load it, PyTorch would have to run code from the file.
    buffer = io.BytesIO()  # a file in memory
    torch.save(model, buffer)
    try:
        buffer.seek(0)
        torch.load(buffer, weights_only=True)  # the default since PyTorch 2.6
    except Exception as error:  # save model.state_dict() instead
        print("whole model:", str(error).partition(". ")[0])  # Weights only load failed


# %% Command line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lesson_code.py", description="PyTorch in five steps.")
    parser.add_argument("--section", type=int, nargs="+", choices=range(1, 6), default=range(1, 6))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of training (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: 0)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoints")
    parser.add_argument("--no-figure", dest="plot", action="store_false", help="no lesson.png")
    args = parser.parse_args(argv)
    if args.epochs < 1 or not 0 <= args.seed < 2**32:
        parser.error("--epochs must be at least 1, and --seed from 0 to 2**32 - 1")
    try:
        device = select_device(args.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    try:
        for number in args.section:
            print(f"\nSection {number}")
            if number == 1:
                environment_setup(device)
            elif number == 2:
                tensor_operations(device)
            elif number == 3:
                autograd_walkthrough()
            elif number == 4:
                build_and_train(device, args.epochs, args.seed)
            else:
                verify_test_and_demo(device, args.epochs, args.seed, args.output, args.plot)
        print(end="", flush=True)
    except BrokenPipeError:  # whoever reads the output has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discard what is still buffered
    except (CheckpointError, OSError) as error:
        parser.exit(1, f"lesson_code.py: {error}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small, and threads wait for each other
    main()
