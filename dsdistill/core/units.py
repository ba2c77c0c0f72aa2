"""Sizes and durations as a human reads them."""


def shown_size(count: int) -> str:
    """Bytes: "6.50 GiB", "12.3 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def shown_duration(seconds: float) -> str:
    """Seconds: "3 h 20 min", "5 min 7 s", "4.2 s"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"
