"""`vb-detect check`: every problem of a raw data set in one list, before a GPU hour is spent.

docs/check.md names the checks, their severity and what to do.
"""

import io
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from voxelbridge.core.data.case_index import INDEX_NAME
from voxelbridge.core.data.dataset import RawCase, RawDataset
from voxelbridge.core.data.executor import Done, Failed, map_cases
from voxelbridge.core.data.known_overlaps import read_known_overlaps
from voxelbridge.core.data.overlap import (
    dataset_names,
    find_overlaps,
    origin_key,
    read_provenances,
)
from voxelbridge.core.data.provenance import Provenance
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.errors import DataError
from voxelbridge.detect.check_case import CaseFacts, CaseToCheck, case_hashes, check_case
from voxelbridge.detect.check_findings import (
    Finding,
    count,
    finding_of,
    findings_json,
    in_order,
    print_table,
    summary,
)

Key = tuple[Literal["patient", "scan"], str]


@dataclass(frozen=True)
class CheckedDataset:
    """What was found, and in how many cases it was looked for."""

    findings: list[Finding]
    num_cases: int


def check_dataset(
    dataset: Path, *, deep: bool, workers: int, against: Sequence[Path] = ()
) -> list[Finding]:
    """Every problem of the raw data set at `dataset`, errors first (see `examine_dataset`)."""
    return examine_dataset(dataset, deep=deep, workers=workers, against=against).findings


def examine_dataset(
    dataset: Path, *, deep: bool, workers: int, against: Sequence[Path] = ()
) -> CheckedDataset:
    """Checks every case in a process of its own, then the cases against each other.

    Without `deep`: headers, labels and JSON. With it every image is decoded whole too. `against`
    names raw data sets and case stores that must not hold the same scans. A case that takes its
    process down is a finding like any other. Raises DataError where dataset.json or a table beside
    it cannot be read, or something in `against` is neither data set nor store.
    """
    raw, problems = RawDataset.survey(dataset)
    others = {path: _provenances_of(path, deep=deep, workers=workers) for path in against}
    findings = [finding_of(problem, None) for problem in problems]
    labelled_test = any(case.has_labels for case in raw.test_cases)
    items = [CaseToCheck(case, True, raw.channel_names) for case in raw.cases]
    items += [CaseToCheck(case, False, raw.channel_names) for case in raw.test_cases]
    facts: list[CaseFacts] = []
    for outcome in map_cases(
        partial(check_case, deep=deep), items, workers=workers, description="checking"
    ):
        match outcome:
            case Done(value=value):
                facts.append(value)
                findings += value.findings
            case Failed(item=item, error=error):
                findings.append(Finding("error", item.case.case_id, "unreadable", str(error)))
    if labelled_test:
        findings += [
            Finding("warning", case.case_id, "missing-label", "the only test cases without labels")
            for case in raw.test_cases
            if not case.has_labels
        ]
    findings += _object_findings(raw, facts)
    findings += _leaks(raw)
    findings += _duplicates(raw, facts)
    findings += _shared(raw, facts, others)
    findings += _known_to_share(raw, others)
    return CheckedDataset(in_order(_relative(findings, dataset)), len(items))


def run_check(
    dataset: Path, *, deep: bool, against: Sequence[Path], workers: int, as_json: bool
) -> None:
    """The command: prints the table or the JSON object; raises DataError if there are errors."""
    # JSON must be alone on stdout, where progress is told as well.
    quiet = redirect_stdout(io.StringIO()) if as_json else nullcontext()
    with quiet:
        checked = examine_dataset(dataset, deep=deep, workers=workers, against=against)
    findings = checked.findings
    text = summary(findings, checked.num_cases)
    if as_json:
        content = findings_json(findings, dataset=dataset, num_cases=checked.num_cases)
        print(json.dumps(content, indent=2))
    else:
        print_table(findings)
        print(text)
    if count(findings, "error"):
        raise DataError(f"{dataset}: {text}; nothing with an error goes into a case store")


def _relative(findings: Sequence[Finding], dataset: Path) -> list[Finding]:
    """Messages with file names as seen from the data set, which the command line names anyway."""
    prefix = f"{dataset}/"
    return [
        Finding(f.severity, f.case_id, f.check, f.message.replace(prefix, "")) for f in findings
    ]


def _object_findings(raw: RawDataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    labels = {fact.case_id: fact.labels for fact in facts}
    of_cases = [labels.get(case.case_id) for case in raw.cases]
    if not of_cases or None in of_cases:
        return []  # the unreadable ones may hold what the others lack
    seen = {label for of_case in of_cases for label in of_case or ()}
    if not seen:
        return [Finding("warning", None, "no-objects", "no training case has an object")]
    return [
        Finding("warning", None, "empty-class", f"class {number} ({name}) has no object")
        for number, name in enumerate(raw.class_names)
        if number not in seen
    ]


def _leaks(raw: RawDataset) -> list[Finding]:
    """The same patient or scan on both sides of a split, as groups.json and origins.json tell."""
    train = [case.case_id for case in raw.cases]
    test = [case.case_id for case in raw.test_cases]
    sides = [("leak-test", "imagesTr", train, "imagesTs", test)]
    for number, fold in enumerate(raw.splits or ()):
        sides.append(
            (
                "leak-fold",
                f"train of fold {number}",
                list(fold["train"]),
                f"val of fold {number}",
                list(fold["val"]),
            )
        )
    findings = []
    for check, here, first, there, second in sides:
        ours, theirs = _holders(raw, first), _holders(raw, second)
        for key in sorted(ours.keys() & theirs.keys()):
            a, b = ours[key], theirs[key]
            if set(a) & set(b):
                continue  # one case on both sides: told as such
            message = f"one {key[0]} is in {here} ({few_of(a)}) and in {there} ({few_of(b)})"
            findings.append(Finding("error", b[0], check, message))
    return findings


def _holders(raw: RawDataset, case_ids: Collection[str]) -> dict[Key, list[str]]:
    holders: dict[Key, list[str]] = {}
    for case_id in case_ids:
        keys: set[Key] = {("patient", raw.groups.get(case_id, case_id))}
        keys |= {("scan", origin_key(name)) for name in raw.origins.get(case_id, ())}
        for key in keys:
            holders.setdefault(key, []).append(case_id)
    return holders


def _duplicates(raw: RawDataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    """Cases that hold the same voxels as an earlier case, training cases first."""
    test = {case.case_id for case in raw.test_cases}
    first: dict[str, str] = {}
    findings = []
    for fact in facts:
        earlier = dict.fromkeys(first[digest] for digest in fact.hashes if digest in first)
        for other in earlier:
            where = "imagesTs" if other in test else "imagesTr"
            message = f"the same voxels as case {other} of {where}; keep one of them"
            findings.append(Finding("error", fact.case_id, "duplicate-image", message))
        for digest in fact.hashes:
            first.setdefault(digest, fact.case_id)
    return findings


def _shared(
    raw: RawDataset, facts: Sequence[CaseFacts], others: Mapping[Path, Mapping[str, Provenance]]
) -> list[Finding]:
    hashes = {fact.case_id: fact.hashes for fact in facts}
    own = {
        case.case_id: _provenance(raw, case.case_id, hashes.get(case.case_id, ()))
        for case in (*raw.cases, *raw.test_cases)
    }
    return [
        Finding(
            "error",
            overlap.first,
            "leak-data-set",
            f"the same {' and '.join(overlap.reasons)} as case {overlap.second} of {path}",
        )
        for path, theirs in others.items()
        for overlap in find_overlaps(own, theirs)
    ]


def _known_to_share(
    raw: RawDataset, others: Mapping[Path, Mapping[str, Provenance]]
) -> list[Finding]:
    """Data sets that are known to show the same scans, which renamed copies hide."""
    known = read_known_overlaps()
    cases = [case.case_id for case in (*raw.cases, *raw.test_cases)]
    own = {raw.name, *dataset_names(_provenance(raw, case_id, ()) for case_id in cases)}
    return [
        Finding("warning", None, "known-overlap", f"{path}: {known.describe(overlap)}")
        for path, theirs in others.items()
        for overlap in known.between(own, {path.resolve().name, *dataset_names(theirs.values())})
    ]


def _provenance(raw: RawDataset, case_id: str, hashes: tuple[str, ...]) -> Provenance:
    return Provenance(
        raw.groups.get(case_id), raw.origins.get(case_id, ()), hashes, dataset=raw.name
    )


def _provenances_of(path: Path, *, deep: bool, workers: int) -> dict[str, Provenance]:
    """What is known about the cases of a case store or a raw data set; images only if `deep`."""
    if (path / INDEX_NAME).is_file():
        return read_provenances(path)
    if not (path / "dataset.json").is_file():
        raise DataError(f"{path}: neither a case store nor a raw data set; cannot compare with it")
    raw, _ = RawDataset.survey(path)
    cases: list[RawCase] = [*raw.cases, *raw.test_cases]
    hashes: dict[str, tuple[str, ...]] = {}
    if deep:
        for outcome in map_cases(
            case_hashes, cases, workers=workers, description=f"reading {path.name}"
        ):
            match outcome:
                case Done(item=case, value=value):
                    hashes[case.case_id] = value
                case Failed(item=case, error=error):
                    raise DataError(f"{path}: cannot compare with it: {error}")
    return {c.case_id: _provenance(raw, c.case_id, hashes.get(c.case_id, ())) for c in cases}
