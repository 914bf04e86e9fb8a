"""Numbers in words."""


def in_short(number: int) -> str:
    """4089184256 as 4.0892 G, 853018 as 853.0 k."""
    for size, unit, digits in ((10**9, "G", 4), (10**6, "M", 2), (10**3, "k", 1)):
        if number >= size:
            return f"{number / size:.{digits}f} {unit}"
    return str(number)
