"""The lesson's model and train(), unchanged, on a dataset with something to learn.

    python -m real_world.digits

The lesson trains on random labels, which a model can only memorize. Here the labels are true. The
data are in three parts: one to train on, in mini-batches; a validation set, to see when the model
begins to overfit; a test set, which is used once, at the end.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lesson_code as lesson
from real_world.common import bounded_int, check, make_parser, print_heading, run_cli, show
from real_world.digits.data import load_digits
from real_world.digits.model import build_model


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("digits", "The lesson's model on 1,797 scanned digits.")
    add = parser.add_argument
    add("--epochs", metavar="N", type=bounded_int(1), default=50, help="default: 50")
    add("--batch-size", metavar="N", type=bounded_int(1), default=64, help="default: 64")
    args = parser.parse_args(argv)
    print_heading(
        "Digits: the lesson's model on real data",
        "two nn.Linear layers and a nn.ReLU activation",
    )
    args.output.mkdir(parents=True, exist_ok=True)

    digits = load_digits(args.seed, args.device)
    model, optimizer = build_model(args.seed, args.device)
    train_set = TensorDataset(digits.X_train, digits.y_train)
    shuffle = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle)
    sizes = f"{len(digits.y_train):,}, {len(digits.y_validation)} and {len(digits.y_test)} images"
    show("training, validation, test", sizes)
    show("steps per epoch", f"{len(loader)}, with mini-batches of {args.batch_size}")

    print("\n  epoch    training loss    validation loss    validation accuracy")
    train_losses: list[float] = []
    validation_losses: list[float] = []
    for epoch in range(1, args.epochs + 1):
        losses = lesson.train(model, loader, nn.CrossEntropyLoss(), optimizer, epochs=1)
        loss, accuracy = lesson.evaluate(model, digits.X_validation, digits.y_validation)
        train_losses.append(sum(losses) / len(losses))
        validation_losses.append(loss)
        if epoch <= 5 or epoch % 5 == 0 or epoch == args.epochs:
            print(
                f"  {epoch:>5}    {train_losses[-1]:>13.4f}    {loss:>15.4f}    {accuracy:>19.1%}"
            )

    best = validation_losses.index(min(validation_losses))
    print()
    show("lowest validation loss", f"{validation_losses[best]:.4f}, after epoch {best + 1}")
    show("validation loss at the end", f"{validation_losses[-1]:.4f}")
    _, train_accuracy = lesson.evaluate(model, digits.X_train, digits.y_train)
    _, test_accuracy = lesson.evaluate(model, digits.X_test, digits.y_test)
    show("training accuracy", f"{train_accuracy:.1%}")
    check("test accuracy", f"{test_accuracy:.1%}, chance level 10%", test_accuracy > 0.5)

    if not args.no_figure:
        from real_world.digits.plot import plot_digits

        predicted, _ = lesson.predict(model, digits.X_test)
        path = args.output / "digits.png"
        plot_digits(path, digits, predicted, train_losses, validation_losses)
        show("figure saved to", path)


if __name__ == "__main__":
    run_cli(main)
