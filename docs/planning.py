"""Print how many images of each class a budget holds: the table of docs/choosing.md."""

from __future__ import annotations

from hmn_replay import BudgetError, HierarchicalMemory

BUDGETS = ("30 KiB", "120 KiB", "300 KiB", "1 MiB", "4 MiB")
SIDES, CLASSES = (32, 64, 224), (10, 100, 200, 1000)


def planned(budget: str, image_shape: tuple[int, int, int], num_classes: int) -> str:
    """Return the images per class, or a dash where the budget does not hold one of each."""
    try:
        layout = HierarchicalMemory.choose_layout(budget, image_shape, num_classes)
        num_images = HierarchicalMemory.max_images(layout, budget, num_classes)
    except BudgetError:
        return "-"
    return f"{num_images // num_classes:,}"


def main() -> None:
    """Print the table."""
    print("| image | classes |", " | ".join(BUDGETS), "|")
    print("|---" * (2 + len(BUDGETS)) + "|")
    for side in SIDES:
        for num_classes in CLASSES:
            row = [planned(budget, (3, side, side), num_classes) for budget in BUDGETS]
            print(f"| 3 x {side} x {side} | {num_classes} |", " | ".join(row), "|")


if __name__ == "__main__":
    main()
