from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from voxelbridge.core.errors import DataError
from voxelbridge.detect.evaluate.tables import (
    BoxTable,
    read_cases,
    read_ground_truth,
    read_predictions,
    write_cases,
    write_ground_truth,
    write_predictions,
)

CASES = ["a", "b c", 'quo"ted,name']
HEADER = "case_id,label,score,z0,y0,x0,z1,y1,x1"
GOOD = "a,0,0.5,0,0,0,1,2,3"


def read(folder: Path, text: str | bytes) -> BoxTable:
    path = folder / "predictions.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_predictions(path, CASES)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("", 1, "the file is empty"),
        (f"{HEADER},score\n", 1, "column 'score' is there twice"),
        (HEADER.replace(",score", ""), 1, "missing column score"),
        (f"{HEADER.replace(',', ';')}\n{GOOD.replace(',', ';')}\n", 1, "missing column case_id"),
        (f"{HEADER}\n{GOOD}\na,0,0.5,0,0\n", 3, "got 5 fields, expected 9"),
        (f"{HEADER}\n{GOOD},7\n", 2, "got 10 fields, expected 9"),
        (f"{HEADER}\n{GOOD}\n\n{GOOD}\n", 3, "an empty line"),
        (f"{HEADER}\nz{GOOD}\n", 2, "case 'za' is not in the list of cases"),
        (f"{HEADER}\na,0,nan,0,0,0,1,1,1\n", 2, "score: got 'nan', expected a finite number"),
        (f"{HEADER}\na,0,,0,0,0,1,1,1\n", 2, "score: got ''"),
        (f"{HEADER}\na,0,1e400,0,0,0,1,1,1\n", 2, "score: got '1e400'"),
        (f"{HEADER}\na,0,1_0,0,0,0,1,1,1\n", 2, "score: got '1_0'"),
        (f"{HEADER}\na,0,0.5,0,0,0,inf,1,1\n", 2, "z1: got 'inf'"),
        (f"{HEADER}\na,0,0.5,0,0,0,1,=A1,1\n", 2, "y1: got '=A1'"),
        (f"{HEADER}\na,1.0,0.5,0,0,0,1,1,1\n", 2, "label: got '1.0', expected a whole number"),
        (f"{HEADER}\na,-1,0.5,0,0,0,1,1,1\n", 2, "label: got '-1'"),
        (f"{HEADER}\na,{'9' * 6000},0.5,0,0,0,1,1,1\n", 2, "expected at most 9999"),
        (f"{HEADER}\n{GOOD}\na,0,0.5,0,5,0,1,4,1\n", 3, "inverted box: y1 = 4.0 is less"),
        (f'{HEADER}\n"a,0,0.5,0,0,0,1,1,1\n', 2, "not valid CSV"),
        (f"{HEADER}\n{GOOD}\n".encode() + b"a\xff,0\n", 3, "not UTF-8"),
        ("\ufeff" + f"{HEADER}\r\n{GOOD}\r\na,0\r\n", 3, "got 2 fields"),
    ],
)
def test_an_error_names_file_and_line(
    tmp_path: Path, text: str | bytes, line: int, problem: str
) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, text)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'predictions.csv'}, line {line}: ")
    assert problem in message
    assert "\n" not in message


def test_columns_are_found_by_name_and_others_ignored(tmp_path: Path) -> None:
    table = read(tmp_path, "x1,note, score,z0,y0,x0,z1,y1,label,case_id\n3,hi,0.5,0,0,0,1,2,4,b c")
    assert table.case_index.tolist() == [1]
    assert table.labels.tolist() == [4]
    assert table.scores is not None
    assert table.scores.tolist() == [0.5]
    assert table.boxes.tolist() == [[0, 0, 0, 1, 2, 3]]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_endings_and_byte_order_marks_do_not_matter(
    tmp_path: Path, ending: str, mark: str
) -> None:
    table = read(tmp_path, mark + ending.join([HEADER, GOOD, GOOD, "", ""]))
    assert len(table) == 2  # equal rows are legal, empty lines at the end too


def test_a_header_alone_is_an_empty_table(tmp_path: Path) -> None:
    table = read(tmp_path, HEADER)
    assert (len(table), table.boxes.shape) == (0, (0, 6))


def test_flat_boxes_are_legal(tmp_path: Path) -> None:
    assert len(read(tmp_path, f"{HEADER}\na,0,0.5,1,1,1,1,1,1\n")) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("case_id\na\nb\na\n", "line 4: case 'a' is listed twice (first on line 2)"),
        ("case_id\na\n ,\n", "line 3: got 2 fields, expected 1"),
        ('case_id\n""\n', "line 2: an empty case_id"),
        ("case_id\n", "no cases"),
        ("name\na\n", "line 1: missing column case_id"),
    ],
)
def test_a_bad_list_of_cases_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "cases.csv"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_cases(path)
    assert problem in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: cannot be read"):
        read_cases(tmp_path / "none.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_ground_truth(tmp_path, CASES)


def test_ground_truth_needs_no_score_and_ignores_one(tmp_path: Path) -> None:
    path = tmp_path / "ground_truth.csv"
    for header, row in (
        (HEADER.replace(",score", ""), GOOD.replace(",0.5", "")),
        (HEADER, GOOD),
    ):
        path.write_text(f"{header}\n{row}\n")
        table = read_ground_truth(path, CASES)
        assert table.scores is None
        assert table.boxes.tolist() == [[0, 0, 0, 1, 2, 3]]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, len(CASES) - 1),
            st.integers(0, 30),
            st.floats(allow_nan=False, allow_infinity=False),
            st.tuples(*[st.floats(-1e6, 1e6)] * 3, *[st.floats(0, 1e6)] * 3),
        ),
        max_size=10,
    )
)
def test_tables_read_back_bit_for_bit(tmp_path: Path, rows: list) -> None:
    low = np.array([row[3][:3] for row in rows]).reshape(-1, 3)
    table = BoxTable(
        case_index=np.array([row[0] for row in rows], dtype=np.int64),
        labels=np.array([row[1] for row in rows], dtype=np.int64),
        boxes=np.concatenate([low, low + np.array([r[3][3:] for r in rows]).reshape(-1, 3)], 1),
        scores=np.array([row[2] for row in rows], dtype=np.float64),
    )
    write_cases(tmp_path / "cases.csv", CASES)
    write_predictions(tmp_path / "p.csv", table, cases=CASES)
    write_ground_truth(tmp_path / "g.csv", table, cases=CASES)
    cases = read_cases(tmp_path / "cases.csv")
    assert cases == CASES
    found, truth = (
        read_predictions(tmp_path / "p.csv", cases),
        read_ground_truth(tmp_path / "g.csv", cases),
    )
    assert found.scores is not None
    assert found.scores.tolist() == [row[2] for row in rows]
    for again in (found, truth):
        assert np.array_equal(again.boxes, table.boxes)
        assert np.array_equal(again.labels, table.labels)
        assert np.array_equal(again.case_index, table.case_index)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(junk=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_junk_is_a_data_error_or_a_table(tmp_path: Path, junk: bytes) -> None:
    message = "legal"
    try:
        assert len(read(tmp_path, f"{HEADER}\n{GOOD}\n".encode() + junk)) >= 1
    except DataError as error:
        message = str(error)
    assert "\n" not in message


def test_a_table_is_gathered_from_tensors_of_each_case() -> None:
    table = BoxTable.from_cases(
        [torch.zeros((0, 6)), torch.tensor([[0.0, 0, 0, 1, 1, 1]])],
        [torch.zeros(0, dtype=torch.int64), torch.tensor([2])],
        scores=[torch.zeros(0), torch.tensor([0.25])],
    )
    assert table.case_index.tolist() == [1]
    assert table.labels.tolist() == [2]
    assert table.scores is not None
    assert table.scores.tolist() == [0.25]
    assert len(BoxTable.from_cases([], [])) == 0


@pytest.mark.parametrize(
    ("boxes", "labels", "scores"),
    [
        (np.zeros((2, 6)), [0], [0.5]),
        (np.zeros((1, 5)), [0], [0.5]),
        (np.array([[1.0, 0, 0, 0, 1, 1]]), [0], [0.5]),
        (np.zeros((1, 6)), [-1], [0.5]),
        (np.zeros((1, 6)), [0], [np.nan]),
        (np.full((1, 6), np.inf), [0], [0.5]),
    ],
)
def test_a_wrong_table_cannot_be_built(
    boxes: np.ndarray, labels: list[int], scores: list[float]
) -> None:
    with pytest.raises(ValueError, match="box table"):
        BoxTable(
            case_index=np.zeros(len(labels), dtype=np.int64),
            labels=np.array(labels, dtype=np.int64),
            boxes=boxes,
            scores=np.array(scores),
        )


def test_predictions_without_scores_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scores"):
        write_predictions(tmp_path / "p.csv", BoxTable.from_cases([], []), cases=[])
