"""A short stage before the denoiser's: the text encoder learns to tell what a caption says.

Called by demo.clips.train. Each thing that a caption may tell has a query that gathers the text's features, as the
transformer's cross-attention does. The denoiser's own loss teaches the order of two headings too slowly.
"""

import torch
import torch.nn.functional as F
from torch import nn

from demo.clips.batches import MovingBatch
from demo.clips.train_denoiser import encode_text
from demo.stage import Stage


class Reader(nn.Module):
    """Tells each of some things from the features of a text.

    Args:
        num_classes: how many values each thing has.
    """

    def __init__(self, width: int, num_classes: list[int]) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(num_classes), width) / width**0.5)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in num_classes)

    def forward(self, text: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        """Logits (B, classes) of each thing, for text (B, T, width) and lengths (B,)."""
        real = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
        logits = (self.queries @ self.key(text).transpose(1, 2)).masked_fill(~real[:, None], -1e9)
        gathered = (logits.softmax(2) @ self.value(text)).unbind(1)
        return [head(features) for head, features in zip(self.heads, gathered, strict=True)]


def labels_of(scenes: MovingBatch) -> torch.Tensor:
    """What captions may tell of N scenes, as class indices (N, 6): shape, colour, background, path, size, speed."""
    sizes, speeds = (values.unique(return_inverse=True)[1] for values in (scenes.radius, scenes.speed))
    return torch.stack([scenes.shape, scenes.colour, scenes.background, scenes.path, sizes, speeds], dim=1)


def train(
    stage: Stage, tokens: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor, *, batch_size: int, run_s: float
) -> torch.Tensor:
    """Trains until the stage has had its planned seconds or this run `run_s`.

    Shapes: tokens (N, captions, T), lengths (N, captions) and labels (N, things), on the device of the stage's modules
    `text_encoder` and `reader`.

    Returns: the shares told right in the last batch, (things,).
    """
    device = labels.device
    right = torch.zeros(labels.shape[1], device=device)
    stage.begin(run_s)
    while stage.goes_on:
        rows = torch.randint(len(tokens), (batch_size,), device=device)
        which = torch.randint(tokens.shape[1], (batch_size,), device=device)
        ids, num_tokens, wanted = tokens[rows, which].long(), lengths[rows, which].long(), labels[rows]
        told = stage.modules["reader"](encode_text(stage.modules["text_encoder"], ids, num_tokens), num_tokens)
        loss = torch.stack([F.cross_entropy(logits, wanted[:, i]) for i, logits in enumerate(told)]).sum()
        loss.backward()
        stage.update()
        right = torch.stack([(logits.argmax(1) == wanted[:, i]).float().mean() for i, logits in enumerate(told)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stage.count_time()
    return right
