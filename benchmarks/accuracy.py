"""Largest float32 errors of MMD^2 and its gradient against float64: `python -m benchmarks.accuracy`.

1,000 points against 1,000 others of the same distribution, where MMD^2 is a small difference of large sums: 3 seeds,
2, 10 and 80 dimensions, both clouds shifted by 0, 100 and 10,000. Errors are relative, of the gradient to its largest
component.
"""

import torch
from torch import Tensor

from infovae_fast import IMQ, RBF, mmd, wae_imq
from infovae_fast.radial import Kernel

KERNELS = {"RBF": lambda d: RBF(), "IMQ": lambda d: IMQ(), "seven-scale IMQ": wae_imq}


def value_and_gradient(x: Tensor, y: Tensor, kernel: Kernel, estimator: str, backend: str) -> tuple[float, Tensor]:
    leaf = x.clone().requires_grad_()
    value = mmd(leaf, y, kernel, estimator, backend=backend)  # type: ignore[arg-type]
    return value.item(), torch.autograd.grad(value, leaf)[0].double()


def main() -> None:
    print("| kernel | backend | biased MMD² | unbiased MMD² | gradient |\n|---|---|---|---|---|")
    for name, kernel in KERNELS.items():
        worst: dict[str, dict[str, float]] = {"reference": {}, "cpp": {}}
        for seed in range(3):
            for d in (2, 10, 80):
                for shift in (0.0, 100.0, 1e4):
                    generator = torch.Generator().manual_seed(seed)
                    x, y = (torch.randn(1000, d, generator=generator) + shift for _ in range(2))
                    for estimator in ("biased", "unbiased"):
                        exact, slope = value_and_gradient(x.double(), y.double(), kernel(d), estimator, "reference")
                        for backend, errors in worst.items():
                            value, gradient = value_and_gradient(x, y, kernel(d), estimator, backend)
                            found = {estimator: abs(value / exact - 1)}
                            found["gradient"] = ((gradient - slope).abs().max() / slope.abs().max()).item()
                            for key, error in found.items():
                                errors[key] = max(error, errors.get(key, 0.0))
        for backend, errors in worst.items():
            cells = " | ".join(f"{errors[key]:.1e}" for key in ("biased", "unbiased", "gradient"))
            print(f"| {name} | {backend} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
