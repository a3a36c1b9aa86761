"""Verification against stored test vectors (`zoo verify`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magihuman.errors import UserError
from magihuman.io.markdown import aligned
from magihuman.io.provenance import file_hash
from magihuman.io.text import load_json
from magihuman.zoo.checks import Parameters, Result, Unsupported, VectorCase, checker, kind_of

MANIFEST = "manifest.json"
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class CaseVerdict:
    """One line of the report; status: "pass", "FAIL" or "unsupported"; result: None where nothing ran."""

    case: str
    kind: str
    status: str
    detail: str
    result: Result | None = None


def verify(folder: str | Path, only: str = "") -> list[CaseVerdict]:
    """Check every case of a vector folder whose name starts with `only`.

    A file that is missing, altered or unreadable is a failure of its case.

    Raises:
        UserError: when the folder has no readable manifest, or no case of that name.
    """
    folder = Path(folder)
    files = read_manifest(folder)
    names = [name for name in files if name.startswith(only)]
    if not names:
        raise UserError(f"no case of {folder} starts with {only!r}; its cases are {', '.join(files)}")
    return [row for name in names for row in _verify_case(folder, name, files[name])]


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The cases of a vector folder: name -> file, sha256, meta, tensors.

    Raises:
        UserError: for a missing folder, or one without a readable manifest.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds {MANIFEST} and the vector files")
    try:
        files = load_json(path)["files"]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {MANIFEST}; give the folder of the vector files") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a manifest of vectors ({error!r}); copy the folder again") from None
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path} lists no cases; copy the folder again")
    for name, entry in files.items():
        if not isinstance(entry, dict) or "file" not in entry:
            raise UserError(f"{path}: case {name!r} names no file; copy the folder again")
    return files


def _verify_case(folder: Path, name: str, entry: dict[str, Any]) -> list[CaseVerdict]:
    kind = kind_of(name)
    fault = _file_fault(folder, entry)
    if fault:
        return [CaseVerdict(name, kind or "-", "FAIL", fault)]
    if kind is None:
        return [CaseVerdict(name, "-", "unsupported", "no check for this kind yet")]
    try:
        stated = Parameters(entry.get("meta", {}))
        results = checker(kind)(VectorCase(name, stated, _tensors(folder / entry["file"])))
        unread = ", ".join(stated.unread())
        if unread and all(result.passed for result in results):
            raise Unsupported(f"states what no check reads: {unread}")
    except Unsupported as reason:
        return [CaseVerdict(name, kind, "unsupported", str(reason))]
    except Exception as error:  # a broken case must not hide the others
        return [
            CaseVerdict(
                name, kind, "FAIL", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
        ]
    return [CaseVerdict(name, kind, "pass" if r.passed else "FAIL", r.what, r) for r in results]


def _file_fault(folder: Path, entry: dict[str, Any]) -> str:
    path = folder / str(entry["file"])
    if not path.is_file():
        return f"{entry['file']} is missing"
    if "sha256" in entry and file_hash(path) != entry["sha256"]:
        return f"{entry['file']} differs from the manifest's sha256"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {key: (list(part.get_shape()), _DTYPES.get(part.get_dtype())) for key, part in slices.items()}
    except SafetensorError as error:
        return f"{entry['file']} is not a readable safetensors file: {error}"
    for key, expected in entry.get("tensors", {}).items():
        shape, dtype = found.get(key, ("missing", None))
        if shape != expected["shape"]:
            return f"{entry['file']}: tensor {key} is {shape}, not {expected['shape']}"
        if dtype != expected.get("dtype", dtype):
            return f"{entry['file']}: tensor {key} is {dtype}, not {expected['dtype']}"
    return ""


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    # Copies, because fp32 products of unaligned mapped memory may differ in the last bit.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def report(rows: list[CaseVerdict], strict: bool) -> tuple[str, int]:
    """Table and exit status: 1 after any failure, or under `strict` after anything unsupported."""
    header = ("case", "kind", "what", "max abs error", "tolerance", "pass")
    lines = [header, *(_line(row) for row in rows)]
    text = "\n".join(aligned(lines))
    cases: dict[str, str] = {}
    for row in rows:
        cases[row.case] = max(cases.get(row.case, ""), row.status, key=("", "pass", "unsupported", "FAIL").index)
    counts = {status: list(cases.values()).count(status) for status in ("pass", "FAIL", "unsupported")}
    text += f"\n{counts['pass']} cases pass, {counts['FAIL']} fail, {counts['unsupported']} unsupported"
    return text, int(counts["FAIL"] > 0 or (strict and counts["unsupported"] > 0))


def _line(row: CaseVerdict) -> tuple[str, ...]:
    kind = row.kind.rstrip("_")
    if row.result is None:
        return row.case, kind, row.detail, "", "", row.status
    tolerance = f"{row.result.tolerance:g}" if row.result.tolerance else "exact"
    return row.case, kind, row.detail, f"{row.result.error:.3g}", tolerance, row.status
