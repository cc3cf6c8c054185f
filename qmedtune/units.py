"""Figures as people read them: counts, sizes, durations. For the display, tables and the report."""


def count(number: float) -> str:
    """`9,500`, `12.4k`, `1.20M`, `3.05B`: three significant digits from ten thousand up."""
    if abs(number) < 9999.5:
        return f"{number:,.0f}"
    # 999,600 is 1.00M, not 1000k
    size, suffix = next(unit for unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(number) >= 0.9995 * unit[0])
    scaled = number / size
    return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f}{suffix}"


def digits3(number: float) -> str:
    """`6.05`, `61.4`, `118`, `1,204`: what is told of a perplexity."""
    return f"{number:.2f}" if abs(number) < 9.995 else f"{number:.1f}" if abs(number) < 99.95 else f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """`512 B`, `640 MiB`, `2.41 GiB`: powers of 1024, as GPU tools print memory."""
    scaled, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while scaled >= 1023.5 and len(units) > 1:
        scaled /= 1024
        units.pop(0)
    return f"{scaled:,.0f} B" if units[0] == "B" else f"{digits3(scaled)} {units[0]}"


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def roughly(seconds: float) -> str:
    """`20 s`, `5 min`, `1.5 h`, `12 h`, `3 days`: what is told of a time that is predicted."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    hours = seconds / 3600
    if hours < 9.75:
        return f"{round(2 * hours) / 2:g} h"
    if hours < 48:
        return f"{round(hours)} h"
    return f"{round(hours / 24)} days"


def clock(seconds: float) -> str:
    """`0:42`, `12:05`, `3:04:05`: for figures that tick."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
