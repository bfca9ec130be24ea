"""Where a figure was measured."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers


def describe_machine(device: torch.device | str = "cpu") -> dict[str, object]:
    """Processor, threads, device and versions, for reports."""
    device = torch.device(device)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine_line(where: Mapping[str, object]) -> str:
    """The same in a line, for tables and reports.

    Args:
        where: as `describe_machine` has it, and `dtype`.
    """
    return (
        f"{where['processor']}, {where['threads']} threads, {where['device']}, {where['dtype']}, "
        f"torch {where['torch']}, transformers {where['transformers']}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
