"""The lesson's model and train(), unchanged, on a dataset with something to learn.

    python -m real_world.digits

The lesson trains on random labels, which a model can only memorize. Here the labels are true. The
data are in three parts: one to train on, in mini-batches; a validation set, to see when the model
begins to overfit; a test set, which is used once, at the end.
"""

import lesson_code as lesson
from real_world.common import check, make_parser, print_heading, run_cli, show
from real_world.digits.data import load_digits
from real_world.digits.model import build_model
from real_world.digits.train import TrainConfig, train_digits
from real_world.training import as_tested, save_config, show_config, with_options


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("digits", "The lesson's model on 1,797 scanned digits.", TrainConfig())
    args = parser.parse_args(argv)
    config = with_options(TrainConfig(), args)
    print_heading(
        "Digits: the lesson's model on real data",
        "two nn.Linear layers and a nn.ReLU activation",
    )
    folder = args.output / "digits"
    show_config(config)
    digits = load_digits(config.seed, args.device)
    sizes = f"{len(digits.y_train):,}, {len(digits.y_validation)} and {len(digits.y_test)} images"
    show("training, validation, test", sizes)

    model = build_model(config.seed, args.device)
    save_config(folder, config)
    train_losses, validation_losses = train_digits(model, digits, config, folder)
    # The epoch to stop at: after it, the model fits the training set ever more closely and
    # generalizes no better.
    best = validation_losses.index(min(validation_losses))
    print()
    show("lowest validation loss", f"{validation_losses[best]:.4f}, after epoch {best + 1}")
    show("validation loss at the end", f"{validation_losses[-1]:.4f}")
    _, train_accuracy = lesson.evaluate(model, digits.X_train, digits.y_train)
    # The test set is used only here, at the end: choices that depend on it would be optimistic.
    _, test_accuracy = lesson.evaluate(model, digits.X_test, digits.y_test)
    show("training accuracy", f"{train_accuracy:.1%}")
    value = f"{test_accuracy:.1%}, chance level 10%"
    check("test accuracy", value, test_accuracy > 0.5, as_tested(config, TrainConfig()))
    show("losses of all steps in", folder / "losses.jsonl")

    if not args.no_figure:
        from real_world.digits.plot import plot_digits

        predicted, _ = lesson.predict(model, digits.X_test)
        path = args.output / "digits.png"
        plot_digits(path, digits, predicted, train_losses, validation_losses)
        show("figure saved to", path)


if __name__ == "__main__":
    run_cli(main)
