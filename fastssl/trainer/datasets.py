"""What is known of the data sets by name, without loading one."""

# Mean and standard deviation of the training images, scaled to [0, 1].
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3054,), (0.3186,)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "folder": ((0.4850, 0.4560, 0.4060), (0.2290, 0.2240, 0.2250)),  # ImageNet's
}
# Options that an image folder alone takes.
FOLDER_OPTIONS = ("image_size", "damaged", "labels", "train_split", "test_split")
GREY = tuple(name for name, (mean, _) in STATISTICS.items() if len(mean) == 1)
