"""What happens to a preprocessed .cu before g++ compiles it: finds kernels, rewrites __shared__, refuses the rest."""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Iterator

_MARKER = re.compile(r'^# (\d+) "([^"]*)"([ \d]*)$')
_SHARED = re.compile(r"(\bextern\s+)?\b__dlkern_shared__\s+([^;]*);")
_KERNEL = re.compile(r'extern\s+"C"\s+__dlkern_global__[^;{}()]*?(\w+)\s*\(')

#: What device code may contain and the shim does not run: (pattern, its name).
_REFUSED = (
    (r"\b(?:asm|__asm__)\b", "inline assembly"),
    (r"<<<", "a launch from device code (<<<...>>>)"),
    (r"\bcooperative_groups\b", "cooperative groups"),
    (r"\b(?:nvcuda\b|wmma\b)", "wmma (mma_tile.h has tensor cores)"),
    (r"\bcudaTextureObject_t\b|\btex[123]D\w*\b|\btexture<", "textures"),
    (r"\bcudaSurfaceObject_t\b|\bsurf[123]D\w*\b", "surfaces"),
    (r"\bcuda::(?:barrier|pipeline|memcpy_async|atomic|std)\b", "libcu++ (cuda::...)"),
    (r"\b__pipeline_\w+\b|\b__cluster_\w+\b", "asynchronous copies and clusters"),
    (r"\b__activemask\b", "__activemask (give masks explicitly)"),
    (r"\b__(?:match_any|match_all|reduce_\w+)_sync\b", "__match_*_sync and __reduce_*_sync"),
    (r"\b(?:__shfl|__shfl_up|__shfl_down|__shfl_xor|__ballot|__any|__all)\b", "warp functions without _sync"),
    (r"\bcudaLaunch\w+\b|\bcudaDeviceSynchronize\b", "the CUDA runtime"),
    (r"\b__nanosleep\b|\bclock(?:64)?\s*\(\s*\)|\bglobaltimer\b", "clocks"),
    (r"\bvolatile\b", "volatile (use barriers or atomics)"),
    (r"\bprintf\b", "printf"),
)
_REFUSALS = [(re.compile(pattern), name) for pattern, name in _REFUSED]


class Refused(NotImplementedError):
    """Device code uses something that the host shim does not run."""


def _segments(text: str) -> Iterator[tuple[str, int, bool, str]]:
    """(file, first line, whether it is a system header, text) of each run of lines between two line markers."""
    file, line, system = "<command-line>", 1, True
    lines: list[str] = []
    for row in text.split("\n"):
        marker = _MARKER.match(row)
        if marker is None:
            lines.append(row)
            continue
        yield file, line, system, "\n".join(lines)
        lines = []
        file, line, system = marker[2], int(marker[1]), "3" in marker[3].split()
    yield file, line, system, "\n".join(lines)


def _split(text: str) -> list[str]:
    """Declarators: ``text`` at its commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, "[": 1, "<": 1, "{": 1, ")": -1, "]": -1, ">": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _shared(match: re.Match[str], file: str, first_line: int) -> str:
    declaration, where = match[2], f"{file}:{first_line + match.string.count(chr(10), 0, match.start())}"
    if match[1]:  # extern: one array of unknown bound, at the launch's bytes
        found = re.fullmatch(r"(.*?)(\w+)\s*\[\s*\]\s*", declaration, re.DOTALL)
        if found is None:
            raise Refused(f"{where}: extern __shared__ other than TYPE NAME[]: {declaration!r}")
        kind = re.sub(r"\balignas\s*\([^()]*\)", "", found[1]).strip()
        return f"{kind}* const {found[2]} = static_cast<{kind}*>(::dlkern_shim::dynamic_shared());"
    if "=" in declaration:
        raise Refused(f"{where}: a __shared__ variable with an initialiser: {declaration!r}")
    names = [re.findall(r"\w+", re.sub(r"\[.*", "", part, flags=re.DOTALL))[-1] for part in _split(declaration)]
    calls = "".join(f" ::dlkern_shim::shared_variable(&{name}, sizeof({name}));" for name in names)
    return f"static {declaration};{calls}"


def transform(text: str, trusted: Container[str] = ()) -> tuple[str, list[str]]:
    """A preprocessed .cu as C++ for g++, and the names of its extern "C" kernels.

    ``trusted`` files, the shim's own headers, are taken as they are, as those of the system are.

    Raises:
        Refused: with the file and line of what is not covered.
    """
    out, own = [], []
    for file, line, system, body in _segments(text):
        flags = " 3" if system else ""
        if not system and file not in trusted:
            for number, row in enumerate(body.split("\n"), line):
                bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', row)
                for pattern, name in _REFUSALS:
                    if pattern.search(bare):
                        raise Refused(f"{file}:{number}: the host shim does not run {name}: {row.strip()}")
            own.append(body)
            body = _SHARED.sub(functools.partial(_shared, file=file, first_line=line), body)
            body = body.replace("__dlkern_global__", "")
        out.append(f'# {line} "{file}"{flags}\n{body}')
    joined = "\n".join(out)
    if "__dlkern_shared__" in re.sub(r"^# .*$", "", joined, flags=re.MULTILINE):
        raise Refused("a __shared__ declaration that the host shim does not understand")
    return joined, _KERNEL.findall("\n".join(own))
