"""What calls cost, added up between two logs without asking the device."""

import torch

from ..modeling.token_macs import sample_macs
from ..modeling.token_outputs import EncoderCall


class WorkLog:
    """Sums over samples: MACs, MACs of the stock encoder, samples, and the tokens alive after each site."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None
        self.layers: list[int] = []

    @torch.no_grad()
    def add(self, call: EncoderCall, config: object) -> None:
        sites = [(layer, work) for layer, work in enumerate(call.layer_work) if work.site is not None]
        alive = [work.feed_forward if work.site.place == "between" else work.keys for _, work in sites]
        macs, whole = sample_macs(call, config)
        columns = [macs, whole, torch.ones_like(whole), *alive]
        sums = torch.stack([column.float().sum() for column in columns])  # some devices know no float64
        layers = [layer for layer, _ in sites]
        if layers != self.layers:  # sites come and go with a warm-up
            self.sums, self.layers = None, layers
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self) -> dict[str, float]:
        """The means since the last call, on the host; nothing if there was none."""
        if self.sums is None:
            return {}
        macs, whole, samples, *alive = self.sums.tolist()
        self.sums = None
        return {"mac_ratio": macs / whole} | {
            f"alive_tokens_layer_{layer}": count / samples for layer, count in zip(self.layers, alive)
        }
