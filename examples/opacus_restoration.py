"""A stock Opacus loop, and the same loop with one more line, at the same privacy cost.

Run: python examples/opacus_restoration.py

The example shows how to attach a restoration; it is not evidence that restoration helps. It uses
one seed and one learning rate; at a learning rate of 0.01 the plain loop does better.
"""

import warnings

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lowrank_dp.optim import attach_restoration

FEATURES, CLASSES, EXAMPLES, BATCH, EPOCHS, DELTA = 96, 4, 4096, 512, 4, 1e-5


def low_rank_data() -> TensorDataset:
    """Records whose class depends on four directions of 96 noisy features."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(FEATURES, CLASSES, generator=generator)).Q
    label = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    x = 2 * directions.T[label] + 0.5 * torch.randn(EXAMPLES, FEATURES, generator=generator)
    return TensorDataset(x, label)


def train(restored: bool) -> tuple[float, float]:
    """Train, and return the loss on the data and the epsilon spent."""
    torch.manual_seed(0)
    data = low_rank_data()
    model = nn.Sequential(
        nn.Linear(FEATURES, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, CLASSES)
    )
    # beta1 = 0, because the restored running mean below serves as momentum
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003, betas=(0.0, 0.999))
    privacy_engine = PrivacyEngine()
    model, optimizer, loader = privacy_engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=BATCH),
        noise_multiplier=8.0,
        max_grad_norm=1.0,
        # a fixed seed makes the example reproducible; leave it out to draw secret noise
        noise_generator=torch.Generator().manual_seed(1),
    )
    if restored:
        attach_restoration(optimizer, "optimal", momentum_beta=0.9, below="zero")  # the new line

    for _ in range(EPOCHS):
        for x, label in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), label).backward()
            optimizer.step()

    with torch.no_grad():
        x, label = data.tensors
        loss = nn.functional.cross_entropy(model(x), label).item()
    return loss, privacy_engine.get_epsilon(DELTA)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)  # Opacus: hooks, secure_mode
    for name, restored in [("Opacus", False), ("Opacus + restoration", True)]:
        loss, epsilon = train(restored)
        print(f"{name:<21} loss {loss:.3f}   epsilon {epsilon:.4f} at delta {DELTA:g}")
